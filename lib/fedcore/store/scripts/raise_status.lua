-- Bring back what Redis has forgotten (a fail-over, a wipe): the caller's view of the job counts if it is further on.
-- KEYS: name of the job's instance, status hash of the caller's instance
-- ARGV: instance, its epoch, lifetime in seconds, start and end of status keys, iteration, attempt, phase, fence,
--       milliseconds since startedMs, firstUploadMs, sealedMs ("" for none each), then field, value, ...
-- What devices exchange (keys, shares) is brought back by nobody: without its field run the iteration is known to lack it.
-- Returns "newer" if the job has a newer instance, "raised" if the status was brought back, else "kept".
local name = redis.call('GET', KEYS[1])
if name and name ~= ARGV[1] then
  local status = ARGV[4] .. name .. ARGV[5]
  local epoch = redis.call('HGET', status, 'epoch') or '0'
  local later = tonumber(epoch) - tonumber(ARGV[2])  -- of two made at the same time, the one that is named first stays
  if redis.call('HEXISTS', status, 'iterationNum') == 0 or later > 0 then return 'newer' end
  if later == 0 and name < ARGV[1] then return 'newer' end
end
if name ~= ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3]) end

local fence, higher = tonumber(redis.call('HGET', KEYS[2], 'fence') or '0'), tonumber(ARGV[9])
if higher > fence and redis.call('EXISTS', KEYS[2]) == 1 then  -- no token comes twice
  redis.call('HSET', KEYS[2], 'fence', higher)
end
local ranks =
  {collecting = 0, sealed = 1, reducing = 2, unmasking = 3, training = 4, trained = 5, candidate = 6}
local number, attempt, phase = unpack(redis.call('HMGET', KEYS[2], 'iterationNum', 'attempt', 'phase'))
local there = {tonumber(number or '-1'), tonumber(attempt or '1'), ranks[phase or 'collecting'] or 0}
local here = {tonumber(ARGV[6]), tonumber(ARGV[7]), ranks[ARGV[8]]}
for i = 1, 3 do
  if there[i] > here[i] then return 'kept' end
  if there[i] < here[i] then break end
  if i == 3 then return 'kept' end
end
redis.call('HDEL', KEYS[2], 'token', 'aggregate', 'digest', 'updates', 'loss', 'accuracy', 'startedMs',
  'firstUploadMs', 'sealedMs', 'filledMs', 'lost', 'disabled', 'run')
redis.call('HSET', KEYS[2], 'iterationNum', ARGV[6], 'attempt', ARGV[7], 'phase', ARGV[8], 'epoch', ARGV[2],
  'fence', math.max(fence, higher), unpack(ARGV, 13))
local now = now_ms()
for i, field in ipairs({'startedMs', 'firstUploadMs', 'sealedMs'}) do
  if ARGV[9 + i] ~= '' then redis.call('HSET', KEYS[2], field, now - ARGV[9 + i]) end
end
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 'raised'
