-- Forget the shares and reports of an ended iteration, and soon its keys and lists; some still answer late repeats.
-- KEYS: status hash; hash of exchangeKeys, hash of reconstructSecrets, and the others of the iteration that are kept a
--       while
-- ARGV: iteration, lifetime in seconds, and what stands before and behind a client in the name of the string that
--       gathers the shares for it
-- Returns 1, or 0 if the iteration goes on.
local number = tonumber(redis.call('HGET', KEYS[1], 'iterationNum'))
if not number or number <= tonumber(ARGV[1]) then return 0 end
for _, client in ipairs(redis.call('HKEYS', KEYS[2])) do redis.call('UNLINK', ARGV[3] .. client .. ARGV[4]) end
redis.call('UNLINK', KEYS[3])
for i = 2, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[2]) end
return 1
