-- The state of job and iteration in one atomic look.
-- KEYS: status hash, name of the job's instance   ARGV[1] key prefix of the caller's instance
-- Returns {name of the job's instance or ""} if there is no status, else
-- {name, redis time in ms, clients, uploads, field, value, field, value, ...}, the fields of the rounds hash among them.
local name = redis.call('GET', KEYS[2]) or ''
local number = redis.call('HGET', KEYS[1], 'iterationNum')
if not number then return {name} end
local answer = {
  name,
  now_ms(),
  redis.call('HLEN', ARGV[1] .. number .. ':clients:Hash'),
  redis.call('HLEN', ARGV[1] .. number .. ':uploads:Hash'),
}
for _, key in ipairs({KEYS[1], ARGV[1] .. number .. ':rounds:Hash'}) do
  for _, part in ipairs(redis.call('HGETALL', key)) do answer[#answer + 1] = part end
end
return answer
