-- Let a client have what a cipher round before this one has gathered, as often as it asks, and count it once.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; hash of the round before, uploads hash
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round; how many complete the round before, name of the round, 1 if the
--       uploaders of an ended iteration may still have it
-- Returns {word, number, 1 if the client's update is counted}: "missing" (or the job has another instance), "closed"
-- and "other" as in exchange_keys.lua; "early" (the round before is not complete), "stranger" (the client took no part
-- in that), "repeated", or "counted".
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0, 0} end
local number, state, run = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run'))
if not number then return {'missing', 0, 0} end
local ended = number ~= ARGV[2]
if ended and (ARGV[10] ~= '1' or redis.call('HGET', KEYS[3], 'list:run') ~= ARGV[3]) then
  return {'other', tonumber(number), 0}
end
if not ended and ((state or '0') ~= '0' or run ~= ARGV[3]) then return {'closed', tonumber(number), 0} end

local uploader = redis.call('HEXISTS', KEYS[6], ARGV[5])
if redis.call('HLEN', KEYS[5]) < tonumber(ARGV[8]) then return {'early', 0, uploader} end
if redis.call('HEXISTS', KEYS[5], ARGV[5]) == 0 then return {'stranger', 0, uploader} end
if ended or redis.call('HSETNX', KEYS[4], ARGV[5], 1) == 0 then return {'repeated', 0, uploader} end

local count = redis.call('HINCRBY', KEYS[3], ARGV[9], 1)
if count == 1 then
  redis.call('HSET', KEYS[3], ARGV[9] .. ':ms', now_ms())
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if count == 1 or count == tonumber(ARGV[7]) then redis.call('PUBLISH', ARGV[4], ARGV[9]) end
return {'counted', count, uploader}
