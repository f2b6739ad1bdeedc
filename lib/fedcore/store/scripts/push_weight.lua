-- Name the model that a worker has trained. The first one of an iteration counts.
-- KEYS: status hash, awaited hash of this Redis, name of the job's instance
-- ARGV: channel for notices, iteration, attempt, digest of the aggregate that it was trained from, its own digest,
--       milliseconds to wait for others, the server's instance
-- Returns 1, also to a repetition, or 0 if the state or the job's instance is another one, or -1 if another server may
-- bring back an earlier push that this Redis has forgotten.
local name = redis.call('GET', KEYS[3])
if name and name ~= ARGV[7] then return 0 end
local number, attempt, phase, aggregate, digest, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'aggregate', 'digest', 'runningState'))
if number ~= ARGV[2] or (attempt or '1') ~= ARGV[3] or (state or '0') ~= '0' then return 0 end
if phase == 'trained' and digest == ARGV[5] then return 1 end
if phase ~= 'training' or aggregate ~= ARGV[4] then return 0 end
if others_are_awaited(KEYS[2], ARGV[6]) then return -1 end
redis.call('HSET', KEYS[1], 'phase', 'trained', 'digest', ARGV[5])
redis.call('PUBLISH', ARGV[1], 'trained')
return 1
