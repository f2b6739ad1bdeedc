-- Name the model that the finaliser has made of the updates.
-- KEYS: status hash, uploads hash
-- ARGV: iteration, attempt, token of the finaliser, digest of the model, how many updates are in it,
--       next phase: "candidate", or "training" if a worker is to train the model further, channel for notices
-- Returns 1, or 0 if the state or the token is another one, or other updates are counted by now.
local number, attempt, phase, token, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'token', 'runningState'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] or (state or '0') ~= '0' then return 0 end
if phase ~= 'reducing' or token ~= ARGV[3] then return 0 end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[5]) then return 0 end
local field = ARGV[6] == 'training' and 'aggregate' or 'digest'
redis.call('HSET', KEYS[1], 'phase', ARGV[6], field, ARGV[4], 'updates', ARGV[5])
if ARGV[6] == 'training' then redis.call('PUBLISH', ARGV[7], 'training') end  -- a candidate is offered by its maker
return 1
