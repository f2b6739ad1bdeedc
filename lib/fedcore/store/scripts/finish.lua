-- Say that the job's last iteration is over, if nobody has said something else of the job meanwhile.
-- KEYS[1] status hash   ARGV: channel for notices, iteration after the last
-- Returns 1, or 0 if the state is another one: an instance that was disabled in its last iteration finishes when it is
-- enabled. A runningState of 1 alone, which somebody wrote over the end, is no such state: there is nothing to suspend.
local number, state, mark = unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'disabled'))
if number ~= ARGV[2] or state == '2' or state == '3' or (state == '1' and mark) then return 0 end
redis.call('HSET', KEYS[1], 'runningState', 2)
redis.call('PUBLISH', ARGV[1], 'finished')
return 1
