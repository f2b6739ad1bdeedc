-- What several scripts do; it is put before each of them.

-- The time of this Redis, milliseconds since the epoch.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Whether a server that is known by name has not brought back yet what this Redis has lost, and is waited for since less
-- than some milliseconds; see await_nodes.lua for what stands in the hash.
local function others_are_awaited(awaited, milliseconds)
  local nodes = redis.call('HGETALL', awaited)
  local now = #nodes > 0 and now_ms()
  for i = 1, #nodes, 2 do
    local node, since = nodes[i], nodes[i + 1]
    if node ~= '' and since ~= 'back' and now - since < tonumber(milliseconds) then return true end
  end
  return false
end
