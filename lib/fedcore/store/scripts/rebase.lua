-- Name another model as the one that devices train from, as nobody has the one that is named now. An iteration whose
-- clients have begun with that one ends by it.
-- KEYS: status hash, clients hash, uploads hash of the iteration
-- ARGV: channel for notices, iteration, digest named now, new digest, next iteration, result, 1 if the job is finished
--       with this iteration, lifetime of the ended iteration's keys in seconds
-- Returns "rebased"; "ended" if the iteration was ended as well; "other" if another iteration or digest is named.
local number, base, phase = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'base', 'phase'))
if number ~= ARGV[2] or (base or '') ~= ARGV[3] then return 'other' end
redis.call('HSET', KEYS[1], 'base', ARGV[4])
redis.call('PUBLISH', ARGV[1], 'rebased')
if redis.call('HLEN', KEYS[2]) == 0 and (phase or 'collecting') == 'collecting' then return 'rebased' end
redis.call('HSET', KEYS[1], 'iterationNum', ARGV[5], 'lastIterationSuccess', 0, 'lastIterationResult', ARGV[6],
  'attempt', 1, 'phase', 'collecting')
redis.call('HDEL', KEYS[1], 'token', 'aggregate', 'digest', 'updates', 'loss', 'accuracy', 'startedMs',
  'firstUploadMs', 'sealedMs', 'filledMs', 'lost', 'run')
redis.call('EXPIRE', KEYS[2], ARGV[8])
redis.call('EXPIRE', KEYS[3], ARGV[8])
if ARGV[7] == '1' then redis.call('HSET', KEYS[1], 'runningState', 2) end
return 'ended'
