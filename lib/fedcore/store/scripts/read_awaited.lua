-- Tell who has brought back what this Redis had forgotten, and who may still do so.
-- KEYS[1] awaited hash of this Redis   ARGV[1] milliseconds to wait for others
-- Returns {node ids that are back, node ids that are awaited}; both are empty if no loss is known.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local back, awaited = {}, {}
local nodes = redis.call('HGETALL', KEYS[1])
for i = 1, #nodes, 2 do
  if nodes[i + 1] == 'back' then
    back[#back + 1] = nodes[i]
  elseif now - nodes[i + 1] < tonumber(ARGV[1]) then
    awaited[#awaited + 1] = nodes[i]
  end
end
return {back, awaited}
