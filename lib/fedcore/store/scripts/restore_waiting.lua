-- Bring back clients that were refused and wait for a place, where Redis has forgotten them; see select_client.lua.
-- KEYS: waiting zset, clients hash of the current iteration
-- ARGV: places, then client, when it was told to return and how long after that its place is kept (milliseconds; the
--       first from now on, less than 0 if it should be back), ...
-- Who has a place now waits no more. Of two times of return the later one counts: it was told last.
-- Returns how many were forgotten.
local now = now_ms()
local most, restored, lifetime = 4 * tonumber(ARGV[1]), 0, 0
for i = 2, #ARGV, 3 do
  local client, returns = ARGV[i], now + ARGV[i + 1]
  local known = redis.call('ZSCORE', KEYS[1], client)
  local later = known and tonumber(known) < returns
  if not known then later = redis.call('ZCARD', KEYS[1]) < most end
  if later and redis.call('HEXISTS', KEYS[2], client) == 0 then
    redis.call('ZADD', KEYS[1], returns, client)
    lifetime = math.max(lifetime, ARGV[i + 1] + ARGV[i + 2])
    if not known then restored = restored + 1 end
  end
end
if redis.call('PTTL', KEYS[1]) < lifetime then redis.call('PEXPIRE', KEYS[1], lifetime) end
return restored
