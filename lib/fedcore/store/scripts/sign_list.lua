-- Keep a client's signature under the list of those whose updates count, once; the round is closed once it is complete.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; hash of the round before, uploads hash
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round, 1 if the signature may be kept, the signature
-- Returns {word, number, 1 if the client's update is counted}: "missing" (or the job has another instance), "closed"
-- and "other" as in exchange_keys.lua; "repeated", "full" (also for the uploaders of an ended iteration whose list was
-- told), "stranger" (the client was not told the list), "unfit", or "counted".
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0, 0} end
local number, state, run = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run'))
if not number then return {'missing', 0, 0} end
local ended = number ~= ARGV[2]
if ended and redis.call('HGET', KEYS[3], 'list:run') ~= ARGV[3] then return {'other', tonumber(number), 0} end
if not ended and ((state or '0') ~= '0' or run ~= ARGV[3]) then return {'closed', tonumber(number), 0} end

local uploader = redis.call('HEXISTS', KEYS[6], ARGV[5])
if redis.call('HEXISTS', KEYS[4], ARGV[5]) == 1 then return {'repeated', 0, uploader} end
local count, threshold = redis.call('HLEN', KEYS[4]), tonumber(ARGV[7])
if ended or count >= threshold then return {'full', count, uploader} end
if redis.call('HEXISTS', KEYS[5], ARGV[5]) == 0 then return {'stranger', count, uploader} end
if ARGV[8] ~= '1' then return {'unfit', count, uploader} end

redis.call('HSET', KEYS[4], ARGV[5], ARGV[9])
count = redis.call('HINCRBY', KEYS[3], 'pushListSign', 1)
if count == 1 then
  redis.call('HSET', KEYS[3], 'pushListSign:ms', now_ms())
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if count == 1 or count == threshold then redis.call('PUBLISH', ARGV[4], 'pushListSign') end
return {'counted', count, uploader}
