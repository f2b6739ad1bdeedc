-- Tell who has brought back what this Redis had forgotten, and who may still do so.
-- KEYS: awaited hash of this Redis, listed   ARGV: milliseconds to wait for others, milliseconds that a lease lasts
-- Returns {node ids that are back, node ids that are awaited, 1 if all who lived lately are on the list}; the first two
-- are empty if no loss is known. The list tells all if it has not been emptied for as long as a lease lasts. The node id "?"
-- holds up places and updates alone, see await_nodes.lua.
local now = now_ms()
local back, awaited = {}, {}
local nodes = redis.call('HGETALL', KEYS[1])
for i = 1, #nodes, 2 do
  if nodes[i + 1] == 'back' then
    back[#back + 1] = nodes[i]
  elseif nodes[i] ~= '?' and now - nodes[i + 1] < tonumber(ARGV[1]) then
    awaited[#awaited + 1] = nodes[i]
  end
end
local listed = redis.call('GET', KEYS[2])
return {back, awaited, listed and now - listed >= tonumber(ARGV[2]) and 1 or 0}
