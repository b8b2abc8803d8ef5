-- Count the claims of each of a list of holds, once. Gives for each 0 booked, 1 late, 2 again.

-- Take a hold out of its lease, as far as that has room; whether it had room for all of it.
local function drawn(hold)
  local lease = hold[LEASE] ~= '' and amounts_of(hold[LEASE])
  if not lease then
    return false
  end
  local covered = true
  for _, claim in ipairs(hold[CLAIMS]) do
    local key, left = claim[KEY], lease[claim[KEY]] or 0
    local taken = math.min(claim[AMOUNT], left)
    if lease[key] then
      local found = counter(key)
      found.held, lease[key] = found.held - taken, left - taken
    end
    covered = covered and taken == claim[AMOUNT]
  end
  write_amounts(hold[LEASE], lease)
  return covered
end

local function confirm(hold)
  if settled_as(hold[OPERATION]) == 'c' then
    return 2
  end
  local covered = release(hold[OPERATION]) or drawn(hold)
  for _, claim in ipairs(hold[CLAIMS]) do
    add(claim)
  end
  settle(hold, 'c')
  return covered and 0 or 1
end

reaped(REAP)
local bookings = {}
for at, hold in ipairs(holds) do
  bookings[at] = confirm(hold)
end
save()
forget_settled()
return bookings
