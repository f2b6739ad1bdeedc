-- Suspend a job: nothing more counts in its current iteration, which ends without a model.
-- KEYS[1] status hash
-- ARGV: key prefix of the instance, result of the iteration, lifetime of the status in seconds, lifetime of the ended
--       iteration's keys in seconds, channel of the job's changes
-- Returns "missing", "completed" (finished or stopped), "already", "disabled", or "marked": runningState was 1 already,
-- written by somebody who knows only that field; the iteration has now ended all the same.
local number, state, mark = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'disabled'))
local current = tonumber(number)
if not current then return 'missing' end
if state == '2' or state == '3' then return 'completed' end
if state == '1' and mark then return 'already' end
redis.call('HSET', KEYS[1], 'runningState', 1, 'disabled', 1, 'iterationNum', current + 1,
  'lastIterationSuccess', 0, 'lastIterationResult', ARGV[2], 'attempt', 1, 'phase', 'collecting')
redis.call('HDEL', KEYS[1], 'token', 'aggregate', 'digest', 'updates', 'loss', 'accuracy', 'startedMs',
  'firstUploadMs', 'sealedMs', 'filledMs', 'lost', 'run')
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', ARGV[1] .. number .. ':clients:Hash', ARGV[4])
redis.call('EXPIRE', ARGV[1] .. number .. ':uploads:Hash', ARGV[4])
redis.call('PUBLISH', ARGV[5], 'disable')
return state == '1' and 'marked' or 'disabled'
