-- Plain counters. KEYS 1: a hash of 'n', the count, and 'e', when it ends, if it does.
-- ARGV 1: the time, for tests, else empty; 2: 'get', 'add' or 'expire'; 3: how many, or how long.

local time = redis.call('TIME')
local now = tonumber(ARGV[1]) or time[1] * 1000 + math.floor(time[2] / 1000)
local ends = tonumber(redis.call('HGET', KEYS[1], 'e') or nil)
if ends and ends <= now then
  redis.call('DEL', KEYS[1])
end
if ARGV[2] == 'add' then
  return redis.call('HINCRBY', KEYS[1], 'n', ARGV[3])
end
local count = tonumber(redis.call('HGET', KEYS[1], 'n') or 0)
if ARGV[2] == 'expire' and redis.call('EXISTS', KEYS[1]) == 1 then
  local left = tonumber(ARGV[3])
  redis.call('HSET', KEYS[1], 'e', string.format('%.0f', now + left))
  -- The end that counts is in the hash; see GRACE in account.lua.
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.max(0, left) + 60000))
end
return count
