-- Undo the seal of an iteration that lost updates, or drop those that a collecting one lost: the clients of the lost
-- ledgers are taken off, so that their places are free, and the next attempt begins. A client whose keys are listed keeps
-- its place: nobody else could do anything with it. The clocks of the rounds stood still while the iteration was sealed.
-- KEYS: status hash, clients hash, uploads hash, ledgers hash, hash of all ledgers that were given up, hash of exchangeKeys
-- ARGV: channel for notices, iteration, attempt, expected phase, expected token, lifetime of the last two hashes in
--       seconds, ledger id, ...
-- Returns {1, updates lost}, or {0, 0} if the state is another one, or devices may know whose updates count: they are to
-- be told of one list only. The ledgers are revoked: nobody may use them again.
local number, attempt, phase, token, state, sealed, started, first = unpack(redis.call('HMGET', KEYS[1], 'iterationNum',
  'attempt', 'phase', 'token', 'runningState', 'sealedMs', 'startedMs', 'firstUploadMs'))
if number ~= ARGV[2] or (attempt or '1') ~= ARGV[3] or (state or '0') ~= '0' then return {0, 0} end
if (phase or 'collecting') ~= ARGV[4] or (token or '') ~= ARGV[5] or phase == 'unmasking' then return {0, 0} end

local gone, lost, freed = {}, 0, 0
for i = 7, #ARGV do
  gone[ARGV[i]] = true
  redis.call('HSET', KEYS[4], ARGV[i], 'revoked')
  redis.call('HSET', KEYS[5], ARGV[i], number)
end
redis.call('EXPIRE', KEYS[4], ARGV[6])
redis.call('EXPIRE', KEYS[5], ARGV[6])
local uploads = redis.call('HGETALL', KEYS[3])
for i = 1, #uploads, 2 do
  if gone[uploads[i + 1]] then
    if redis.call('HEXISTS', KEYS[6], uploads[i]) == 0 then freed = freed + redis.call('HDEL', KEYS[2], uploads[i]) end
    redis.call('HDEL', KEYS[3], uploads[i])
    lost = lost + 1
  end
end
if sealed then
  local stood = now_ms() - sealed
  if started then redis.call('HSET', KEYS[1], 'startedMs', started + stood) end
  if first then redis.call('HSET', KEYS[1], 'firstUploadMs', first + stood) end
end
if freed > 0 then redis.call('HDEL', KEYS[1], 'filledMs') end  -- their places are to be taken anew
redis.call('HINCRBY', KEYS[1], 'lost', lost)
redis.call('HSET', KEYS[1], 'attempt', ARGV[3] + 1, 'phase', 'collecting')
redis.call('HDEL', KEYS[1], 'token', 'aggregate', 'digest', 'updates', 'loss', 'accuracy', 'sealedMs')
redis.call('PUBLISH', ARGV[1], 'reopened')
return {1, lost}
