-- Hand a member's shares over to those for whom they are, once; the round is closed once enough have shared.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; hash of the round before, and then for
--       each other member the string that gathers the shares for it
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round, 1 if the shares may be stored, and for each string of KEYS
--       what is to be added to it
-- Returns {word, number}: "missing" (or the job has another instance), "closed" and "other" as in exchange_keys.lua;
-- "repeated", "full", "stranger" (nobody has given the client the list), "unfit", or "counted".
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0} end
local number, state, run = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run'))
if not number then return {'missing', 0} end
if number ~= ARGV[2] then return {'other', tonumber(number)} end
if (state or '0') ~= '0' or run ~= ARGV[3] then return {'closed', tonumber(number)} end

if redis.call('HEXISTS', KEYS[4], ARGV[5]) == 1 then return {'repeated', 0} end
local count, threshold = redis.call('HLEN', KEYS[4]), tonumber(ARGV[7])
if count >= threshold then return {'full', count} end
if redis.call('HEXISTS', KEYS[5], ARGV[5]) == 0 then return {'stranger', count} end
if ARGV[8] ~= '1' then return {'unfit', count} end

for i = 6, #KEYS do
  local record = ARGV[i + 3]
  if redis.call('APPEND', KEYS[i], record) == #record then redis.call('EXPIRE', KEYS[i], ARGV[6]) end
end
redis.call('HSET', KEYS[4], ARGV[5], 1)
count = redis.call('HINCRBY', KEYS[3], 'shareSecrets', 1)
if count == 1 then
  redis.call('HSET', KEYS[3], 'shareSecrets:ms', now_ms())
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
if count == 1 or count == threshold then redis.call('PUBLISH', ARGV[4], 'shareSecrets') end
return {'counted', count}
