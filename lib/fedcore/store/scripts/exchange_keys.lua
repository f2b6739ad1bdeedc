-- Put a client's public keys on the list of an iteration, which is closed once it has as many members as it needs.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; clients hash
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round, 1 if the keys may be listed; mark of the keys (16 bytes), and the
--       entry with them
-- Returns {word, number}: "missing" (or the job has another instance); "closed" (the job is disabled, or this Redis may not have had all of the
-- iteration: number is the current one); "other" (another iteration is the current one); "repeated" (these keys are on
-- the list), "full", "unknown" (the client has no place), "unfit", or "counted" (number is how many are listed). Other
-- keys of a member take the place of those before, but only as long as nobody can have been told the list.
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0} end
local number, state, run = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run'))
if not number then return {'missing', 0} end
if number ~= ARGV[2] then return {'other', tonumber(number)} end
if (state or '0') ~= '0' or (run and run ~= ARGV[3]) then return {'closed', tonumber(number)} end

local held = redis.call('HGET', KEYS[4], ARGV[5])
if held and ARGV[8] == '1' and held:sub(1, 16) == ARGV[9] then return {'repeated', 0} end
local count, threshold = redis.call('HLEN', KEYS[4]), tonumber(ARGV[7])
if count >= threshold then return {'full', count} end
if not run or redis.call('HEXISTS', KEYS[5], ARGV[5]) == 0 then return {'unknown', count} end
if ARGV[8] ~= '1' then return {'unfit', count} end

redis.call('HSET', KEYS[4], ARGV[5], ARGV[9] .. ARGV[10])
if held then return {'counted', count} end
count = redis.call('HINCRBY', KEYS[3], 'exchangeKeys', 1)
if count == 1 then
  redis.call('HSET', KEYS[3], 'exchangeKeys:ms', now_ms())
  redis.call('EXPIRE', KEYS[3], ARGV[6])
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if count == 1 or count == threshold then redis.call('PUBLISH', ARGV[4], 'exchangeKeys') end
return {'counted', count}
