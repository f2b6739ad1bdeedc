-- Count an update, at most once, and never beyond the quorum. The only permission to answer 200.
-- KEYS: status hash, clients hash, uploads hash (both of iteration ARGV[1]), uploads hash of the request's iteration,
--       ledgers hash, heartbeat of the server, name of the job's instance, awaited hash of this Redis; and, if the update
--       brings an evaluation vector or is masked, zset and hash of these vectors; and if it is masked, hash of the
--       cipher round that ends before it, and masked hash
-- ARGV: the server's iteration, its attempt, the request's iteration, client, quorum, ledger id,
--       1 if the weights may count, lifetime in seconds, node id of the server, the server's instance, milliseconds to
--       wait for others, 1 if this question was asked before and its answer lost; and, with a vector, the vector, how
--       many clients' vectors are kept, their lifetime in seconds; if the update is masked, a digest of it
-- Returns {word, number, text}: "missing" (or the job has another instance); "closed" (another iteration or attempt: number is the current iteration);
-- "revoked" (the ledger is not the server's), "lapsed" (the server's lease has run out); "awaited" (another server may
-- hold this client's update already, and has not brought it back yet);
-- "repeated" (text is the ledger that holds it), "full", "unknown", "other", "unfit", "unprepared" (masked, by a client
-- that did not end the cipher rounds), "changed" (masked, and not what it sent before), or "accepted" (number is the
-- count, text the client's meta). A repeat by the same ledger is accepted again, even in a later attempt or while the job
-- is disabled: its owner knows whether it has kept the update, or lost the first reply.
-- A sealed iteration has its quorum: one below it has lost some that count. An update that was asked about before may be
-- of them, and another server may have told its client that it counts: it is taken back, as long as no model is made.
-- Two updates under the same masks would tell the difference of what is in them, so a masked one comes again, after its
-- ledger was lost, only as it was.
-- A vector is kept in the same step as its update is counted, so a repeat keeps nothing twice. It takes the place of its
-- client's one before; the oldest are dropped beyond the number that is kept.
local name = redis.call('GET', KEYS[7])
if name and name ~= ARGV[10] then return {'missing', 0, ''} end
local holder = redis.call('HGET', KEYS[4], ARGV[4])
if holder and (holder ~= ARGV[6] or ARGV[3] ~= ARGV[1]) then return {'repeated', 0, holder} end
if redis.call('HGET', KEYS[5], ARGV[6]) ~= ARGV[9] then return {'revoked', 0, ''} end
if redis.call('EXISTS', KEYS[6]) == 0 then return {'lapsed', 0, ''} end
local number, attempt, phase, state =
  unpack(redis.call('HMGET', KEYS[1], 'iterationNum', 'attempt', 'phase', 'runningState'))
if not number then return {'missing', 0, ''} end
if number ~= ARGV[1] then return {'closed', tonumber(number), ''} end
local masked = ARGV[16] and redis.call('HGET', KEYS[12], ARGV[4])
if masked and masked ~= ARGV[16] then return {'changed', 0, ''} end
local count = redis.call('HLEN', KEYS[3])
if holder then return {'accepted', count, redis.call('HGET', KEYS[2], ARGV[4])} end
if (attempt or '1') ~= ARGV[2] or (state or '0') ~= '0' then return {'closed', tonumber(number), ''} end
if others_are_awaited(KEYS[8], ARGV[11]) then return {'awaited', 0, ''} end
local open = (phase or 'collecting') == 'collecting'
local forgotten = ARGV[12] == '1' and (phase == 'sealed' or phase == 'reducing')
if count >= tonumber(ARGV[5]) or not (open or forgotten) then return {'full', count, ''} end
local meta = redis.call('HGET', KEYS[2], ARGV[4])
if not meta then return {'unknown', count, ''} end
if ARGV[3] ~= number then return {'other', tonumber(number), ''} end
if ARGV[7] ~= '1' then return {'unfit', count, ''} end
if ARGV[16] and redis.call('HEXISTS', KEYS[11], ARGV[4]) == 0 then return {'unprepared', count, ''} end

if (ARGV[13] or '') ~= '' then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[9], time[1] * 1000000 + time[2], ARGV[4])
  redis.call('HSET', KEYS[10], ARGV[4], ARGV[13])
  for _ = tonumber(ARGV[14]) + 1, redis.call('ZCARD', KEYS[9]) do
    redis.call('HDEL', KEYS[10], redis.call('ZPOPMIN', KEYS[9])[1])
  end
  redis.call('EXPIRE', KEYS[9], ARGV[15])
  redis.call('EXPIRE', KEYS[10], ARGV[15])
end
if ARGV[16] then
  redis.call('HSET', KEYS[12], ARGV[4], ARGV[16])
  redis.call('EXPIRE', KEYS[12], ARGV[8])
end
redis.call('HSET', KEYS[3], ARGV[4], ARGV[6])
if count == 0 then
  redis.call('EXPIRE', KEYS[2], ARGV[8])
  redis.call('EXPIRE', KEYS[3], ARGV[8])
  redis.call('HSET', KEYS[1], 'firstUploadMs', now_ms())
end
return {'accepted', count + 1, meta}
