-- Let a suspended job go on; if its last iteration is behind it, it is finished instead.
-- KEYS[1] status hash   ARGV: number of the last iteration, lifetime of the status in seconds, channel of the job's changes
-- Returns "missing", "completed" (finished or stopped), "already" (it runs), "enabled" or "finished".
local number, state = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState'))
local current = tonumber(number)
if not current then return 'missing' end
if state == '2' or state == '3' then return 'completed' end
if state ~= '1' then return 'already' end
local over = current > tonumber(ARGV[1])
redis.call('HSET', KEYS[1], 'runningState', over and 2 or 0)
redis.call('HDEL', KEYS[1], 'disabled')
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('PUBLISH', ARGV[3], 'enable')
return over and 'finished' or 'enabled'
