-- Keep a client's report, once, as long as the masks are still to be taken off. More than complete the round are taken:
-- those that came first may not fit together.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; hash of getClientList, uploads hash
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round, 1 if the report may be kept, the report
-- Returns {word, number, 1 if the client's update is counted}: "missing" (or the job has another instance), "closed"
-- and "other" as in exchange_keys.lua; "repeated", "full" (the masks are off; also for the uploaders of an ended
-- iteration whose list was told), "stranger" (the client was not told the list), "unfit", or "counted".
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0, 0} end
local number, state, run, phase =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run', 'phase'))
if not number then return {'missing', 0, 0} end
local ended = number ~= ARGV[2]
if ended and redis.call('HGET', KEYS[3], 'list:run') ~= ARGV[3] then return {'other', tonumber(number), 0} end
if not ended and ((state or '0') ~= '0' or run ~= ARGV[3]) then return {'closed', tonumber(number), 0} end

local uploader = redis.call('HEXISTS', KEYS[6], ARGV[5])
if ended or phase == 'candidate' then return {'full', 0, uploader} end
if redis.call('HEXISTS', KEYS[4], ARGV[5]) == 1 then return {'repeated', 0, uploader} end
if phase ~= 'unmasking' or redis.call('HEXISTS', KEYS[5], ARGV[5]) == 0 then return {'stranger', 0, uploader} end
if ARGV[8] ~= '1' then return {'unfit', 0, uploader} end

redis.call('HSET', KEYS[4], ARGV[5], ARGV[9])
local count = redis.call('HINCRBY', KEYS[3], 'reconstructSecrets', 1)
if count == 1 then
  redis.call('HSET', KEYS[3], 'reconstructSecrets:ms', now_ms())
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if count == 1 or count >= tonumber(ARGV[7]) then redis.call('PUBLISH', ARGV[4], 'reconstructSecrets') end
return {'counted', count, uploader}
