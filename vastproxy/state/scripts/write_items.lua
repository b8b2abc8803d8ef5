-- Set and remove items of an account, each by itself.
-- KEYS 1: a hash of 'i|<name>' -> '<number> <value>', of which the numbers tell the order of writing,
--   and 'last', the highest number, and 'ends', when all of them end.
-- ARGV 1: the time, for tests, else empty; 2: milliseconds to live; 3: items at the most; 4: bytes;
--   then name, 'set' or 'drop', and value, for each change.

local ITEMS = KEYS[1]
local time = redis.call('TIME')
local now = tonumber(ARGV[1]) or time[1] * 1000 + math.floor(time[2] / 1000)
local life, most, bytes = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])

local function all_items()
  local items, fields, size = {}, redis.call('HGETALL', ITEMS), 0
  for at = 1, #fields, 2 do
    if string.sub(fields[at], 1, 2) == 'i|' then
      local number, value = string.match(fields[at + 1], '^(%d+) (.*)$')
      local item = {field = fields[at], number = tonumber(number)}
      item.size = #item.field - 2 + #value
      items[#items + 1], size = item, size + item.size
    end
  end
  table.sort(items, function(one, other) return one.number < other.number end)
  return items, size
end

if tonumber(redis.call('HGET', ITEMS, 'ends') or 0) <= now then
  redis.call('DEL', ITEMS)
end
for at = 5, #ARGV, 3 do
  redis.call('HDEL', ITEMS, 'i|' .. ARGV[at])
  if ARGV[at + 1] == 'set' then
    local number = redis.call('HINCRBY', ITEMS, 'last', 1)
    redis.call('HSET', ITEMS, 'i|' .. ARGV[at], number .. ' ' .. ARGV[at + 2])
  end
end
local items, size = all_items()
local count = #items
for _, item in ipairs(items) do
  if count > most or size > bytes then
    redis.call('HDEL', ITEMS, item.field)
    count, size = count - 1, size - item.size
  end
end
if count == 0 then
  redis.call('DEL', ITEMS)
  return 0
end
redis.call('HSET', ITEMS, 'ends', string.format('%.0f', now + life))
-- The end that counts is in the hash; see GRACE in account.lua.
redis.call('PEXPIRE', ITEMS, string.format('%.0f', math.max(0, life) + 60000))
return count
