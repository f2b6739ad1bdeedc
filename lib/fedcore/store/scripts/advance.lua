-- End an iteration and open the next.
-- KEYS: status hash, clients hash, uploads hash (of the iteration that ends)
-- ARGV: iteration, attempt, next iteration, success, result, 1 if the job is finished with it, lifetime of the
--       status in seconds, lifetime of the ended iteration's keys in seconds, expected phase or "" for any
-- Returns 1, or 0 if the state is another one.
local number, attempt, phase = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] then return 0 end
if ARGV[9] ~= '' and (phase or 'collecting') ~= ARGV[9] then return 0 end
redis.call('HSET', KEYS[1], 'iterationNum', ARGV[3], 'lastIterationSuccess', ARGV[4],
  'lastIterationResult', ARGV[5], 'attempt', 1, 'phase', 'collecting')
redis.call('HDEL', KEYS[1], 'token', 'digest', 'startedMs', 'firstUploadMs')
if ARGV[6] == '1' then redis.call('HSET', KEYS[1], 'runningState', 2) end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[8])
redis.call('EXPIRE', KEYS[3], ARGV[8])
return 1
