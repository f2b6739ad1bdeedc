-- Stop counting updates of an iteration that has its quorum.
-- KEYS: status hash, uploads hash   ARGV: channel for notices, iteration, attempt, quorum
-- Returns 1, or 0 if the state is another one or the quorum is not reached.
local number, attempt, phase, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'runningState'))
if number ~= ARGV[2] or (attempt or '1') ~= ARGV[3] or (state or '0') ~= '0' then return 0 end
if (phase or 'collecting') ~= 'collecting' or redis.call('HLEN', KEYS[2]) < tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], 'phase', 'sealed', 'sealedMs', now_ms())
redis.call('PUBLISH', ARGV[1], 'sealed')
return 1
