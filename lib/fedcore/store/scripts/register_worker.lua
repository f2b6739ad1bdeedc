-- Say that a worker lives, if its instance is still the job's.
-- KEYS: name of the job's instance, workers hash, heartbeat key
-- ARGV: the instance, worker id, lifetime of the heartbeat, lifetime of the workers hash in seconds
-- Returns the name of the job's instance, or nil if there is none; the worker is on the list if it is its own.
local name = redis.call('GET', KEYS[1])
if name == ARGV[1] then
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
end
return name
