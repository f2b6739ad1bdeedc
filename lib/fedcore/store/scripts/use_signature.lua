-- Take note of a signature of a client, which may be used for one request only.
-- KEYS[1] signatures that the client has used
-- ARGV: signature and request (16 bytes each), its time stamp (13 digits), the oldest time stamp that anybody takes,
--       how many signatures are kept, lifetime in milliseconds
-- Returns "new", "repeated" (the same request came before), or "used" (another request bore it).
-- A record has 45 bytes: signature, request, time stamp. The oldest are dropped beyond the number that is kept.
local kept, before = {}, redis.call('GET', KEYS[1]) or ''
for at = 1, #before, 45 do
  local record = before:sub(at, at + 44)
  if record:sub(1, 16) == ARGV[1] then return record:sub(17, 32) == ARGV[2] and 'repeated' or 'used' end
  if tonumber(record:sub(33)) >= tonumber(ARGV[4]) then kept[#kept + 1] = record end
end
kept[#kept + 1] = ARGV[1] .. ARGV[2] .. ARGV[3]
local first = math.max(1, #kept - ARGV[5] + 1)
redis.call('SET', KEYS[1], table.concat(kept, '', first), 'PX', ARGV[6])
return 'new'
