-- Remember which servers may still bring back what Redis has forgotten. Who has done so is not awaited, whoever names it.
-- The node id "" stands for servers that the one who asks cannot name; it holds up no place and no update, only
-- judgements. "?" is the opposite: the servers of an older instance, for which places and updates wait until the job has
-- that one again.
-- KEYS[1] awaited hash of this Redis   ARGV: lifetime in seconds, node id of the server that asks, other node ids ...
-- Returns what stands there of the server that asks: another word after another loss of data.
local now = now_ms()
for i = 2, #ARGV do redis.call('HSETNX', KEYS[1], ARGV[i], now) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return redis.call('HGET', KEYS[1], ARGV[2])
