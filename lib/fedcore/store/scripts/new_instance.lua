-- Start a new instance of a job in place of the current one.
-- KEYS: instance name, status and hyper-parameters of the current instance, status and hyper-parameters of the new one
-- ARGV: current name, new name, hyper-parameters (JSON), lifetime of the job's keys in seconds, lifetime of the
--       current instance's keys in seconds, channel of the job's changes
-- Returns 1, or 0 if the current instance is another one, or the new name is taken.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[1] == ARGV[2] or redis.call('EXISTS', KEYS[4], KEYS[5]) ~= 0 then return 0 end
local epoch, base, typical = unpack(redis.call('HMGET', KEYS[2], 'epoch', 'base', 'typicalMs'))
redis.call('SET', KEYS[5], ARGV[3], 'EX', ARGV[4])
redis.call('HSET', KEYS[4], 'iterationNum', 1, 'lastIterationSuccess', 1, 'lastIterationResult', '',
  'runningState', 0, 'attempt', 1, 'phase', 'collecting', 'epoch', (tonumber(epoch) or 0) + 1)
if base then redis.call('HSET', KEYS[4], 'base', base) end
if typical then redis.call('HSET', KEYS[4], 'typicalMs', typical) end
redis.call('EXPIRE', KEYS[4], ARGV[4])
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('EXPIRE', KEYS[3], ARGV[5])
redis.call('PUBLISH', ARGV[6], 'instance')
return 1
