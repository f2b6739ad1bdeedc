-- Become the finaliser of a sealed iteration, or succeed one that is gone.
-- KEYS[1] status hash   ARGV: iteration, attempt, token of the finaliser that is gone ("" if there was none), node id
-- Returns {token, phase, digest of the aggregate or "", of the candidate or ""}, or {} if the state is another one.
-- A token is a number that never comes again, a colon and the node id. It is compared for equality only.
local number, attempt, phase, token, state, aggregate, digest = unpack(redis.call('HMGET', KEYS[1],
  'iterationNum', 'attempt', 'phase', 'token', 'runningState', 'aggregate', 'digest'))
if number ~= ARGV[1] or (attempt or '1') ~= ARGV[2] or (state or '0') ~= '0' then return {} end
if (phase or 'collecting') == 'collecting' or (token or '') ~= ARGV[3] then return {} end
token = redis.call('HINCRBY', KEYS[1], 'fence', 1) .. ':' .. ARGV[4]
if phase == 'sealed' then phase = 'reducing' end
redis.call('HSET', KEYS[1], 'token', token, 'phase', phase)
return {token, phase, aggregate or '', digest or ''}
