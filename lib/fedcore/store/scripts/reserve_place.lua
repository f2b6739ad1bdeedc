-- Keep a place free for a client that is refused after it had one: an old device that finds none next gives up.
-- KEYS: waiting zset
-- ARGV: client, places, when it is told to return and how long after that its place is kept (milliseconds; the first
--       from now on)
-- Returns 1, or 0 if too many wait already. See select_client.lua for what follows.
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4])
local most = 4 * tonumber(ARGV[2])
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= most then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
local lifetime = ARGV[3] + ARGV[4]
if redis.call('PTTL', KEYS[1]) < lifetime then redis.call('PEXPIRE', KEYS[1], lifetime) end
return 1
