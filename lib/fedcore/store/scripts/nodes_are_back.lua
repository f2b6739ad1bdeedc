-- Say that servers have brought back what they know.
-- KEYS[1] awaited hash of this Redis
-- ARGV: lifetime in seconds, the server that says so, what await_nodes returned to it or "", node ids ...
-- Returns 1, or 0 if Redis has lost data once more since await_nodes: then they have not brought it back to this one.
local known = redis.call('HGET', KEYS[1], ARGV[2])
if ARGV[3] ~= '' and known ~= ARGV[3] and known ~= 'back' then return 0 end
for i = 4, #ARGV do redis.call('HSET', KEYS[1], ARGV[i], 'back') end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
