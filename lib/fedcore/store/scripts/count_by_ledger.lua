-- How many accepted updates lie in each ledger.
-- KEYS[1] uploads hash   Returns {ledger id, count, ...}.
local counts, answer = {}, {}
for _, ledger in ipairs(redis.call('HVALS', KEYS[1])) do counts[ledger] = (counts[ledger] or 0) + 1 end
for ledger, count in pairs(counts) do
  answer[#answer + 1] = ledger
  answer[#answer + 1] = count
end
return answer
