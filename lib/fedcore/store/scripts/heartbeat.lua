-- Say that a node lives, and renew what must not expire while it does.
-- KEYS: nodes hash, heartbeat key, instance name, status hash, hyper-parameters, listed
-- ARGV: node id, address, lifetime of the heartbeat, lifetime of the job's keys in seconds
-- Returns 1.
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
redis.call('SET', KEYS[6], now_ms(), 'NX')
for _, key in ipairs({KEYS[1], KEYS[3], KEYS[4], KEYS[5], KEYS[6]}) do redis.call('EXPIRE', key, ARGV[4]) end
return 1
