-- Reserve each of a list of holds, wholly or not at all; a repetition changes nothing.
-- Gives for each {1, claims left out ...} granted, {0, claim without room} or {0} refused. Nothing:
-- room may be taken by reservations that have lapsed, and there are more of them.

local all_reaped = reaped(REAP)

local function repeated(hold, amounts)
  local verdict = {1}
  for at, claim in ipairs(hold[CLAIMS]) do
    if not amounts[claim[KEY]] then
      verdict[#verdict + 1] = at - 1
    end
  end
  return verdict
end

local function has_room(claim)
  local taken = live(claim) + counter(claim[KEY]).held
  return not claim[LIMIT] or claim[AMOUNT] <= claim[LIMIT] - taken
end

local function judged(hold)
  local verdict, amounts = {1}, {}
  for at, claim in ipairs(hold[CLAIMS]) do
    if has_room(claim) then
      amounts[claim[KEY]] = claim[AMOUNT]
    elseif claim[ENFORCED] then
      return {0, at - 1}, nil
    else
      verdict[#verdict + 1] = at - 1
    end
  end
  return verdict, amounts
end

local function take(hold, amounts)
  local ends = now + hold[TTL]
  for _, key in ipairs({COUNTERS, HELD, LAPSE}) do
    lives_until(key, ends)
  end
  write_amounts(hold[OPERATION], amounts)
  redis.call('ZADD', LAPSE, whole(ends), hold[OPERATION])
  for key, amount in pairs(amounts) do
    local found = counter(key)
    found.held = found.held + amount
  end
end

local function reserve(hold)
  local settled = settled_as(hold[OPERATION])
  if settled then
    return {settled == 'c' and 1 or 0}
  end
  local earlier = amounts_of(hold[OPERATION])
  if earlier then
    return repeated(hold, earlier)
  end
  local verdict, amounts = judged(hold)
  local has_all = amounts and #verdict == 1
  if not has_all and not all_reaped then
    return nil
  end
  if amounts then
    -- An earlier one of this id may have lapsed, and not been taken off.
    release(hold[OPERATION])
    take(hold, amounts)
  end
  return verdict
end

local verdicts = {}
for at, hold in ipairs(holds) do
  verdicts[at] = reserve(hold)
  if not verdicts[at] then
    -- What was granted before this one stays so, and is told when the caller asks again.
    reaped(REAP_MORE)
    verdicts = nil
    break
  end
end
save()
return verdicts
