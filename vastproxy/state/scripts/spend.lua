-- Add ARGV 1 to the money of a campaign; give the new sum. KEYS 1: its counters, as in account.lua.

local sum = redis.call('HINCRBY', KEYS[1], 'c|spent', ARGV[1])
-- A reservation may have made the hash, and let it expire.
redis.call('PERSIST', KEYS[1])
return sum
