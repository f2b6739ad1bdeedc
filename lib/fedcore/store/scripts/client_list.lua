-- Tell a client whose updates count. From the first answer on that list is frozen, and told to all alike.
-- KEYS: status hash, name of the job's instance, rounds hash, hash of the round; uploads hash, clients hash
-- ARGV: the server's instance, the request's iteration, run id of this Redis, channel for notices, client, lifetime in
--       seconds, how many clients complete the round
-- Returns {word, number, client, client, ...}, the clients only with "repeated" and "counted": "missing" (or the job
-- has another instance), "closed" and "other" as in exchange_keys.lua; "early" (the updates that count are not final),
-- "stranger" (the client's is none of them), "repeated", or "counted". Who may have sent an update that was lost is told
-- "lost" while it may come again, and "late" afterwards. Of an ended iteration whose list was told to somebody it is told
-- to its other uploaders as long as it is kept, and all others are told "other"; nothing is counted there.
local name = redis.call('GET', KEYS[2])
if name and name ~= ARGV[1] then return {'missing', 0} end
local number, state, run, phase, attempt =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'runningState', 'run', 'phase', 'attempt'))
if not number then return {'missing', 0} end
local ended = number ~= ARGV[2]
if ended and redis.call('HGET', KEYS[3], 'list:run') ~= ARGV[3] then return {'other', tonumber(number)} end
if not ended and ((state or '0') ~= '0' or run ~= ARGV[3]) then return {'closed', tonumber(number)} end

local final, uploader = phase == 'unmasking' or phase == 'candidate', redis.call('HEXISTS', KEYS[5], ARGV[5]) == 1
local again = not ended and (attempt or '1') ~= '1' and not uploader and redis.call('HEXISTS', KEYS[6], ARGV[5]) == 1
if again and (phase or 'collecting') == 'collecting' then return {'lost', 0} end
if not ended and not final then return {'early', 0} end
if ended and not uploader then return {'other', tonumber(number)} end
if not uploader then return {again and 'late' or 'stranger', 0} end
local answer = {'repeated', 0}
if not ended and redis.call('HSETNX', KEYS[4], ARGV[5], 1) == 1 then
  local count = redis.call('HINCRBY', KEYS[3], 'getClientList', 1)
  if count == 1 then
    redis.call('HSET', KEYS[3], 'getClientList:ms', now_ms(), 'list:run', run)
    redis.call('EXPIRE', KEYS[4], ARGV[6])
  end
  if count == 1 or count == tonumber(ARGV[7]) then redis.call('PUBLISH', ARGV[4], 'getClientList') end
  answer = {'counted', count}
end
for i, client in ipairs(redis.call('HKEYS', KEYS[5])) do answer[i + 2] = client end
return answer
