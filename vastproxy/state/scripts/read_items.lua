-- Give the items of an account: name, '<number> <value>', name, ... in any order.
-- KEYS 1: as in write_items.lua. ARGV 1: the time, for tests, else empty.

local time = redis.call('TIME')
local now = tonumber(ARGV[1]) or time[1] * 1000 + math.floor(time[2] / 1000)
local ends = tonumber(redis.call('HGET', KEYS[1], 'ends') or 0)
local items = {}
if now < ends then
  local fields = redis.call('HGETALL', KEYS[1])
  for at = 1, #fields, 2 do
    if string.sub(fields[at], 1, 2) == 'i|' then
      items[#items + 1] = string.sub(fields[at], 3)
      items[#items + 1] = fields[at + 1]
    end
  end
end
return items
