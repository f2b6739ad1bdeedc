-- End an iteration and open the next.
-- KEYS: status hash, clients hash, uploads hash (of the iteration that ends), ledgers hash
-- ARGV: channel for notices, iteration, attempt, expected phase, expected token, next iteration, success, result,
--       1 if the job is finished with it, digest of the new model or "" if the one before stays,
--       lifetime of the status in seconds, lifetime of the ended iteration's keys in seconds
-- Returns 1, or 0 if the state is another one. Ledgers that were revoked are forgotten. What a valid iteration took from
-- its last place to now is remembered, for whoever is to tell refused devices when the next one opens.
local number, attempt, phase, token, filled =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'token', 'filledMs'))
if number ~= ARGV[2] or (attempt or '1') ~= ARGV[3] then return 0 end
if (phase or 'collecting') ~= ARGV[4] or (token or '') ~= ARGV[5] then return 0 end
redis.call('HSET', KEYS[1], 'iterationNum', ARGV[6], 'lastIterationSuccess', ARGV[7],
  'lastIterationResult', ARGV[8], 'attempt', 1, 'phase', 'collecting')
redis.call('HDEL', KEYS[1], 'token', 'aggregate', 'digest', 'updates', 'loss', 'accuracy', 'startedMs',
  'firstUploadMs', 'sealedMs', 'filledMs', 'lost', 'run')
if filled and ARGV[7] == '1' then
  local took = now_ms() - filled
  if took >= 0 then redis.call('HSET', KEYS[1], 'typicalMs', took) end  -- else somebody has set the clock
end
if ARGV[9] == '1' then redis.call('HSET', KEYS[1], 'runningState', 2) end
if ARGV[10] ~= '' then redis.call('HSET', KEYS[1], 'base', ARGV[10]) end
redis.call('EXPIRE', KEYS[1], ARGV[11])
redis.call('EXPIRE', KEYS[2], ARGV[12])
redis.call('EXPIRE', KEYS[3], ARGV[12])
local ledgers = redis.call('HGETALL', KEYS[4])
for i = 1, #ledgers, 2 do
  if ledgers[i + 1] == 'revoked' then redis.call('HDEL', KEYS[4], ledgers[i]) end
end
redis.call('PUBLISH', ARGV[1], 'advanced')
return 1
