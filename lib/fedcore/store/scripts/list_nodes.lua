-- The living nodes of a role; the dead ones are taken off the list.
-- KEYS[1] nodes hash   ARGV[1] start of the heartbeat keys   ARGV[2] their end
-- Returns {node id, address, ...}.
local alive, listed = {}, redis.call('HGETALL', KEYS[1])
for i = 1, #listed, 2 do
  if redis.call('EXISTS', ARGV[1] .. listed[i] .. ARGV[2]) == 1 then
    alive[#alive + 1] = listed[i]
    alive[#alive + 1] = listed[i + 1]
  else
    redis.call('HDEL', KEYS[1], listed[i])
  end
end
return alive
