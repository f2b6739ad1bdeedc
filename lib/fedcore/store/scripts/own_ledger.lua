-- Make a node the owner of a ledger.
-- KEYS[1] ledgers hash   ARGV: ledger id, new owner, the owner it must have now ("" for none), lifetime in seconds
-- Returns 1, or 0 if somebody else owns it.
local owner = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if owner ~= ARGV[3] and owner ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
