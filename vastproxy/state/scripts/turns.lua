-- Turns of a shared rate: GCRA, as in upstream/limiter.py. KEYS 1: '<seconds> <nanoseconds>', when
-- the next turn would be due if all came evenly; in two numbers, since a double cannot hold both.
-- ARGV 1: nanoseconds between two turns; 2: how many may come at once; 3: how many are wanted.
-- Gives how many are granted, and the nanoseconds until the next one is due.

local interval, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tolerance = (burst - 1) * interval
local time = redis.call('TIME')

-- By how much the next turn is ahead of now.
local ahead = 0
local seconds, nanoseconds = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%d+)$')
if seconds then
  ahead = (seconds - time[1]) * 1e9 + nanoseconds - time[2] * 1000
  -- What is further ahead comes of a slower rate before, or of a clock that was set back.
  ahead = math.max(0, math.min(ahead, tolerance + interval))
end

local granted = 0
if ahead <= tolerance then
  granted = math.min(wanted, math.floor((tolerance - ahead) / interval) + 1)
end
if granted > 0 then
  ahead = ahead + granted * interval
  local due = time[2] * 1000 + ahead
  local kept = string.format('%.0f %.0f', time[1] + math.floor(due / 1e9), due % 1e9)
  -- When it is due it says no more than nothing does; a little longer, as clocks may be set.
  redis.call('SET', KEYS[1], kept, 'PX', string.format('%.0f', ahead / 1e6 + 1000))
end
return {granted, string.format('%.0f', math.max(0, ahead - tolerance))}
