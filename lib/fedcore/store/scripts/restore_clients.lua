-- Bring back clients of an iteration, and in which ledger their updates are, where Redis has forgotten them.
-- KEYS: status hash, clients hash, uploads hash, ledgers hash, hash of all ledgers that were given up
-- ARGV: iteration, ledger id ("" for clients that have only a place), node id of the ledger's owner,
--       lifetime of the iteration's keys in seconds, digest of the model that they trained from or "",
--       then client key, meta, ...
-- Returns {word, number}: "closed" (another iteration, or its model is made and Redis has all that is in it) or "rebased" (this iteration's clients train
-- from another model): number tells of how many of the ledger's clients no update is counted in it; 0 if Redis does not
-- remember, or if the ledger was given up. "revoked" (the ledger is another node's), 0. "restored", updates.
-- What Redis knows of a client is never changed. The ledgers hash lives on as long as the status. Where something was
-- forgotten of the clients, so may be the keys and shares that they exchanged, and field run of the status says so.
local number, base, updates = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'base', 'updates'))
local owner = ARGV[2] ~= '' and redis.call('HGET', KEYS[4], ARGV[2])
local mine = not owner or owner == ARGV[3]

local word
if number ~= ARGV[1] or (updates and redis.call('HLEN', KEYS[3]) >= tonumber(updates)) then
  word = 'closed'
elseif ARGV[5] ~= '' and (base or '') ~= '' and base ~= ARGV[5] then
  word = 'rebased'
end
if word then
  local missing, known = 0, word == 'rebased' or redis.call('EXISTS', KEYS[3]) == 1
  if ARGV[2] ~= '' and mine and known and redis.call('HEXISTS', KEYS[5], ARGV[2]) == 0 then
    for i = 6, #ARGV, 2 do missing = missing + 1 - redis.call('HEXISTS', KEYS[3], ARGV[i]) end
  end
  return {word, missing}
end

if not mine then return {'revoked', 0} end
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[4], ARGV[2], ARGV[3])
  local left = redis.call('PTTL', KEYS[1])
  if left > 0 then redis.call('PEXPIRE', KEYS[4], left) end
end
local restored, places = 0, 0
for i = 6, #ARGV, 2 do
  places = places + redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1])
  if ARGV[2] ~= '' then restored = restored + redis.call('HSETNX', KEYS[3], ARGV[i], ARGV[2]) end
end
if places + restored > 0 then redis.call('HSET', KEYS[1], 'run', '') end
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[4])
return {'restored', restored}
