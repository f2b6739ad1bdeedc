-- Note what a worker says of the model that it has pushed, and let that be published.
-- KEYS: status hash
-- ARGV: channel for notices, iteration, attempt, loss, accuracy
-- Returns 1, also to a repetition, or 0 if no model was pushed, or the state is another one.
local number, attempt, phase, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'runningState'))
if number ~= ARGV[2] or (attempt or '1') ~= ARGV[3] or (state or '0') ~= '0' then return 0 end
if phase == 'candidate' then return 1 end
if phase ~= 'trained' then return 0 end
redis.call('HSET', KEYS[1], 'phase', 'candidate', 'loss', ARGV[4], 'accuracy', ARGV[5])
redis.call('PUBLISH', ARGV[1], 'candidate')
return 1
