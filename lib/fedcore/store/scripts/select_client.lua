-- Give a client a place in the current iteration, at most once, and never more places than there are.
-- KEYS: status hash, clients hash, uploads hash, waiting zset (clients and uploads of iteration ARGV[1]), name of the
--       job's instance, awaited hash of this Redis
-- ARGV: iteration, client, meta, places, 1 if the request may have a place, lifetime in seconds,
--       when a refused client is told to return, how long before that its place is kept free, and how long after
--       (all three in milliseconds; the first from now on), the server's instance, run id of this Redis,
--       milliseconds to wait for others
-- Returns {word, number}: "missing" (or the job has another instance); "closed" (not collecting, or another iteration:
-- number is the current one); "awaited" (another server may know a later iteration, and has not brought it back yet);
-- "known" (a repeat), "other key" (it holds a place with another key, see ClientMeta), "uploaded", "full", "reserved"
-- (full, and this client was refused before), "unfit", or "selected" (number is the count).
-- A client refused for want of a place waits in the zset under the time of its return, as one that reserve_place.lua has
-- put there. Others leave it its place around that time. More may wait than there are places, as who comes too early for
-- one is held until the next iteration; but not more than four iterations have places for.
local name = redis.call('GET', KEYS[5])
if name and name ~= ARGV[10] then return {'missing', 0} end
local number, phase, state = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'phase', 'runningState'))
if not number then return {'missing', 0} end
if number ~= ARGV[1] or (state or '0') ~= '0' then return {'closed', tonumber(number)} end
if others_are_awaited(KEYS[6], ARGV[12]) then return {'awaited', 0} end
local held = redis.call('HGET', KEYS[2], ARGV[2])
if held then
  -- What was brought back from a ledger has no key; that client's update is counted.
  local key = held:match('^[^,]*,[^,]*,[^,]*,(.*)$')
  if key and key ~= ARGV[3]:match('^[^,]*,[^,]*,[^,]*,(.*)$') then return {'other key', 0} end
  if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then return {'uploaded', 0} end
  return {'known', 0}
end
if (phase or 'collecting') ~= 'collecting' then return {'closed', tonumber(number)} end

local now = now_ms()
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - ARGV[9])
local count, places = redis.call('HLEN', KEYS[2]), tonumber(ARGV[4])
local mine = redis.call('ZSCORE', KEYS[4], ARGV[2])
local expected = redis.call('ZCOUNT', KEYS[4], '-inf', now + ARGV[8])
if count >= places or (not mine and count + expected >= places) then
  if mine or redis.call('ZCARD', KEYS[4]) < 4 * places then
    redis.call('ZADD', KEYS[4], now + ARGV[7], ARGV[2])
    local lifetime = ARGV[7] + ARGV[9]
    if redis.call('PTTL', KEYS[4]) < lifetime then redis.call('PEXPIRE', KEYS[4], lifetime) end
  end
  return {mine and 'reserved' or 'full', count}
end
if ARGV[5] ~= '1' then return {'unfit', count} end

redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('ZREM', KEYS[4], ARGV[2])
if count == 0 then
  redis.call('EXPIRE', KEYS[2], ARGV[6])
  redis.call('HSET', KEYS[1], 'startedMs', now)
  redis.call('HSETNX', KEYS[1], 'run', ARGV[11])
end
if count + 1 >= places then redis.call('HSET', KEYS[1], 'filledMs', now) end
return {'selected', count + 1}
