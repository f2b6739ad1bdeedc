-- Name the model that the finaliser has made.
-- KEYS: status hash, uploads hash
-- ARGV: iteration, attempt, token of the finaliser, digest of the model, how many updates are in it
-- Returns 1, or 0 if the state or the token is another one, or other updates are counted by now.
local number, attempt, phase, token, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'token', 'runningState'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] or (state or '0') ~= '0' then return 0 end
if phase ~= 'reducing' or token ~= ARGV[3] then return 0 end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[5]) then return 0 end
redis.call('HSET', KEYS[1], 'phase', 'candidate', 'digest', ARGV[4], 'updates', ARGV[5])
return 1
