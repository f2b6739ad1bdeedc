-- Go from one phase of an iteration to the next.
-- KEYS[1] status hash   ARGV: iteration, attempt, expected phase, new phase, then field, value, ... to set with it
-- Returns 1, or 0 if the state is another one.
local number, attempt, phase, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'runningState'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] then return 0 end
if (phase or 'collecting') ~= ARGV[3] or (state or '0') ~= '0' then return 0 end
redis.call('HSET', KEYS[1], 'phase', ARGV[4], unpack(ARGV, 5))
return 1
