-- Tell what stands on counters: for each claim of the one hold {counted, reserved}. Nothing: more
-- reservations have lapsed than one call takes off.

if not reaped(REAP_MORE) then
  save()
  return nil
end
local levels = {}
for at, claim in ipairs(holds[1][CLAIMS]) do
  levels[at] = {live(claim), counter(claim[KEY]).held}
end
save()
return levels
