-- Name the model that the finaliser has made of the updates.
-- KEYS: status hash, uploads hash
-- ARGV: iteration, attempt, token of the finaliser, digest of the model, how many updates are in it,
--       next phase: "candidate", "training" if a worker is to train the model further, "unmasking" if devices are to help
--       to take masks off it; channel for notices; run id of the Redis that devices began to exchange keys with, or ""
-- Returns 1, or 0 if the state or the token is another one, or other updates are counted by now.
local number, attempt, phase, token, state, run =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'token', 'runningState', 'run'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] or (state or '0') ~= '0' then return 0 end
local unmasked = phase == 'unmasking' and ARGV[6] == 'candidate'
if (phase ~= 'reducing' and not unmasked) or token ~= ARGV[3] then return 0 end
if ARGV[8] ~= '' and run ~= ARGV[8] then return 0 end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[5]) then return 0 end
local field = ARGV[6] == 'candidate' and 'digest' or 'aggregate'
redis.call('HSET', KEYS[1], 'phase', ARGV[6], field, ARGV[4], 'updates', ARGV[5])
if field == 'aggregate' then redis.call('PUBLISH', ARGV[7], ARGV[6]) end  -- a candidate is offered by its maker
return 1
