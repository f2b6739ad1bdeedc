-- Whether nobody gets a place or is counted, as others are to bring back first what this Redis has lost.
-- KEYS[1] awaited hash of this Redis   ARGV[1] milliseconds to wait for others   Returns 1 or 0.
return others_are_awaited(KEYS[1], ARGV[1]) and 1 or 0
