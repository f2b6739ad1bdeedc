-- Write the first state of an instance, unless there is one; a hash without an iteration is none.
-- KEYS[1] status hash   ARGV: lifetime in seconds, iteration, success, result, running state, digest of the model,
--       how many instances the job had before, if any
-- Returns 1 if written, 0 if there was one.
if redis.call('HEXISTS', KEYS[1], 'iterationNum') == 1 then return 0 end
redis.call('HSET', KEYS[1], 'iterationNum', ARGV[2], 'lastIterationSuccess', ARGV[3],
  'lastIterationResult', ARGV[4], 'runningState', ARGV[5], 'attempt', 1, 'phase', 'collecting', 'base', ARGV[6])
if ARGV[7] then redis.call('HSET', KEYS[1], 'epoch', ARGV[7]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
