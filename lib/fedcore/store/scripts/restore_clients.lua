-- Bring back clients of an iteration, and in which ledger their updates are, where Redis has forgotten them.
-- KEYS: status hash, clients hash, uploads hash, ledgers hash
-- ARGV: iteration, ledger id ("" for clients that have only a place), node id of the ledger's owner,
--       lifetime of the iteration's keys and of the ledgers hash in seconds, then client key, meta, ...
-- Returns {word, restored}: "closed" (another iteration, or its model is made), "revoked" (the ledger is another node's), or "restored".
-- What Redis knows of a client is never changed.
local number, phase = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'phase'))
if number ~= ARGV[1] or phase == 'candidate' then return {'closed', 0} end
if ARGV[2] ~= '' then
  local owner = redis.call('HGET', KEYS[4], ARGV[2])
  if owner and owner ~= ARGV[3] then return {'revoked', 0} end
  redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])
  redis.call('EXPIRE', KEYS[4], ARGV[5])
end
local restored = 0
for i = 6, #ARGV, 2 do
  redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1])
  if ARGV[2] ~= '' then restored = restored + redis.call('HSETNX', KEYS[3], ARGV[i], ARGV[2]) end
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return {'restored', restored}
