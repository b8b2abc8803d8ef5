-- What reserve, confirm, void and levels have in common; it stands before each of them.
--
-- It says the same as ledger.py, and one set of tests holds both. Times are Unix milliseconds.
--
-- KEYS  1 hash: 'c|<key>' counted, 'r|<key>' reserved. Counted is one number of a lifetime counter
--         (so that HINCRBY works on it), '<end> <began> <count>' of a fixed or calendar window, and
--         '<end> <piece> <count> <piece> <count> ...' of a rolling one.
--       2 hash: reservation -> what it reserved, as JSON; the amounts are strings in it, since
--         cjson writes numbers with 14 digits
--       3 sorted set: reservation -> when it lapses
--       4 sorted set: 'c<operation>' confirmed, 'v<operation>' void -> until when that is remembered
-- ARGV  1 the time, for tests; else empty
--       2 JSON: {calendars, holds}. A hold is {operation, ttl, keep, lease, claims}; a claim is
--         {key, amount, limit or false, kind, milliseconds or the number of a calendar, enforced}
--
-- Nothing is written to the counters before save(), and an error before the first write changes
-- nothing.

local COUNTERS, HELD, LAPSE, SETTLED = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local KEY, AMOUNT, LIMIT, KIND, WINDOW, ENFORCED = 1, 2, 3, 4, 5, 6
local OPERATION, TTL, KEEP, LEASE, CLAIMS = 1, 2, 3, 4, 5

local PIECES = 1000
local FOR_EVER = 2 ^ 53 - 1
-- Reservations that have lapsed, and that one call takes off in any case: a quarter of a millisecond.
local REAP = 200
-- The same for a call that cannot decide before they are off: about two milliseconds.
local REAP_MORE = 2000
-- Settled operations that one call forgets at the most; each adds few.
local FORGET = 100
-- Ends are in the data, and are judged there. A key that lives on a little can do no harm; one that
-- is gone too soon because somebody set the server's clock could.
local GRACE = 60000
-- Fields of the hash of counters that are looked at for each new one, and at the most: so a quarter
-- of them may have ended, and nobody waits for all to be looked through.
local PRUNE, PRUNE_MOST = 4, 400

local function now_ms()
  if ARGV[1] ~= '' then
    return tonumber(ARGV[1])
  end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local now = now_ms()
local told = cjson.decode(ARGV[2])
local calendars, holds = told[1], told[2]

local function whole(number)
  return string.format('%.0f', number)
end

-- --- How long keys live -------------------------------------------------------------------------

local lifetimes = {}

local function before(key)
  local found = lifetimes[key]
  if not found then
    found = {left = redis.call('PTTL', key), ends = 0}
    lifetimes[key] = found
  end
  return found
end

local function lives_until(key, ends)
  local found = before(key)
  found.ends = math.max(found.ends, ends)
end

local function expire()
  for key, found in pairs(lifetimes) do
    local left = found.ends - now + GRACE
    if found.ends >= FOR_EVER then
      redis.call('PERSIST', key)
    elseif found.ends > 0 and found.left ~= -1 and left > found.left then
      redis.call('PEXPIRE', key, whole(left))
    end
  end
end

-- --- Counters -----------------------------------------------------------------------------------

local cache = {}

local function counter(key)
  local found = cache[key]
  if not found then
    local got = redis.call('HMGET', COUNTERS, 'c|' .. key, 'r|' .. key)
    found = {text = got[1], held = tonumber(got[2] or '0')}
    found.held_before = found.held
    cache[key] = found
  end
  return found
end

local function width(ms)
  return math.max(1, math.floor(ms / PIECES))
end

local function first_piece(ms)
  return math.floor((now - ms) / width(ms))
end

local function period(calendar)
  local begins = calendar[1]
  for _, bound in ipairs(calendar) do
    if bound <= now then
      begins = bound
    end
  end
  return begins
end

local function period_ends(calendar)
  for _, bound in ipairs(calendar) do
    if bound > now then
      return bound
    end
  end
  return now
end

-- Read what stands on a counter, as its window has it.
local function parse(found, kind)
  if found.kind then
    return
  end
  local numbers = {}
  for number in string.gmatch(found.text or '', '%-?%d+') do
    numbers[#numbers + 1] = tonumber(number)
  end
  found.kind, found.count, found.began, found.pieces = kind, 0, 0, {}
  if kind == 'l' then
    found.count = numbers[1] or 0
  elseif kind == 'r' then
    for at = 2, #numbers, 2 do
      found.pieces[numbers[at]] = numbers[at + 1]
    end
  else
    found.began, found.count = numbers[2] or 0, numbers[3] or 0
  end
end

local function live(claim)
  local found, kind, window = counter(claim[KEY]), claim[KIND], claim[WINDOW]
  parse(found, kind)
  if kind == 'r' then
    local first, sum = first_piece(window), 0
    for piece, count in pairs(found.pieces) do
      if piece >= first then
        sum = sum + count
      end
    end
    return sum
  elseif kind == 'f' then
    return now < found.began + window and found.count or 0
  elseif kind == 'c' then
    return found.began == period(calendars[window]) and found.count or 0
  end
  return found.count
end

local function add_piece(found, ms, amount)
  local first, piece, kept = first_piece(ms), math.floor(now / width(ms)), {}
  for at, count in pairs(found.pieces) do
    if at >= first then
      kept[at] = count
    end
  end
  kept[piece] = (kept[piece] or 0) + amount
  local last = piece
  for at in pairs(kept) do
    last = math.max(last, at)
  end
  found.pieces, found.ends = kept, (last + 1) * width(ms) + ms
end

local function add(claim)
  local found, kind, window = counter(claim[KEY]), claim[KIND], claim[WINDOW]
  parse(found, kind)
  found.changed = true
  if kind == 'r' then
    add_piece(found, window, claim[AMOUNT])
  elseif kind == 'f' then
    if now >= found.began + window then
      found.began, found.count = now, 0
    end
    found.count, found.ends = found.count + claim[AMOUNT], found.began + window
  elseif kind == 'c' then
    local begins = period(calendars[window])
    if found.began ~= begins then
      found.began, found.count = begins, 0
    end
    found.count, found.ends = found.count + claim[AMOUNT], period_ends(calendars[window])
  else
    found.count, found.ends = found.count + claim[AMOUNT], FOR_EVER
  end
  lives_until(COUNTERS, found.ends)
end

local function text_of(found)
  if found.kind == 'l' then
    return whole(found.count)
  elseif found.kind ~= 'r' then
    return whole(found.ends) .. ' ' .. whole(found.began) .. ' ' .. whole(found.count)
  end
  local words = {whole(found.ends)}
  for piece, count in pairs(found.pieces) do
    words[#words + 1] = whole(piece)
    words[#words + 1] = whole(count)
  end
  return table.concat(words, ' ')
end

-- Drop counters whose window is over: a viewer that comes every day would keep them for ever.
local function prune(created)
  local looked = math.min(PRUNE * created, PRUNE_MOST)
  local fields = redis.call('HRANDFIELD', COUNTERS, looked, 'WITHVALUES')
  for at = 1, #fields, 2 do
    local ends = string.match(fields[at + 1], '^(%-?%d+) ')
    if string.sub(fields[at], 1, 2) == 'c|' and ends and tonumber(ends) <= now then
      redis.call('HDEL', COUNTERS, fields[at])
    end
  end
end

local function save()
  local created, free = 0, {}
  for key, found in pairs(cache) do
    if found.changed then
      created = created + redis.call('HSET', COUNTERS, 'c|' .. key, text_of(found))
    end
    if found.held > 0 and found.held ~= found.held_before then
      redis.call('HSET', COUNTERS, 'r|' .. key, whole(found.held))
    elseif found.held ~= found.held_before then
      free[#free + 1] = key
    end
  end
  -- After all that is written: a hash that is empty for a moment is gone, and its lifetime with it.
  for _, key in ipairs(free) do
    redis.call('HDEL', COUNTERS, 'r|' .. key)
  end
  if created > 0 then
    prune(created)
  end
  expire()
end

-- --- Reservations -------------------------------------------------------------------------------

local function decoded(text)
  local amounts = cjson.decode(text)
  for key, amount in pairs(amounts) do
    amounts[key] = tonumber(amount)
  end
  return amounts
end

local function take_off(amounts)
  for key, amount in pairs(amounts) do
    local found = counter(key)
    found.held = found.held - amount
  end
end

local function write_amounts(operation, amounts)
  local texts = {}
  for key, amount in pairs(amounts) do
    texts[key] = whole(amount)
  end
  redis.call('HSET', HELD, operation, cjson.encode(texts))
end

-- Take off a reservation; whether there was one. Its time may be over, as reaped() is not always done.
local function release(operation)
  local text, ends = redis.call('HGET', HELD, operation), redis.call('ZSCORE', LAPSE, operation)
  if not text then
    return false
  end
  take_off(decoded(text))
  redis.call('HDEL', HELD, operation)
  redis.call('ZREM', LAPSE, operation)
  return ends and tonumber(ends) > now
end

-- Give what a reservation holds, if its time is not over.
local function amounts_of(operation)
  local text, ends = redis.call('HGET', HELD, operation), redis.call('ZSCORE', LAPSE, operation)
  if text and ends and tonumber(ends) > now then
    return decoded(text)
  end
  return nil
end

-- Take off so many reservations whose time is over. False: there are more, so that room may be taken
-- which is free. Who cannot decide because of that gives nil, and the caller asks again.
local function reaped(most)
  local due = redis.call('ZRANGEBYSCORE', LAPSE, '-inf', whole(now), 'LIMIT', 0, most)
  if #due == 0 then
    return true
  end
  local same = {}
  for _, text in ipairs(redis.call('HMGET', HELD, unpack(due))) do
    if text then
      same[text] = same[text] or decoded(text)
      take_off(same[text])
    end
  end
  redis.call('HDEL', HELD, unpack(due))
  -- They end first, and so are the first.
  redis.call('ZREMRANGEBYRANK', LAPSE, 0, #due - 1)
  return #due < most
end

-- --- Settled operations -------------------------------------------------------------------------

local function settled_as(operation)
  for _, how in ipairs({'c', 'v'}) do
    local ends = redis.call('ZSCORE', SETTLED, how .. operation)
    if ends and now < tonumber(ends) then
      return how
    end
  end
  return nil
end

local function settle(hold, how)
  local ends = now + (how == 'c' and hold[KEEP] or hold[TTL])
  lives_until(SETTLED, ends)
  redis.call('ZADD', SETTLED, whole(ends), how .. hold[OPERATION])
  if how == 'c' then
    redis.call('ZREM', SETTLED, 'v' .. hold[OPERATION])
  end
end

local function forget_settled()
  local over = redis.call('ZRANGEBYSCORE', SETTLED, '-inf', whole(now), 'LIMIT', 0, FORGET + #holds)
  for _, member in ipairs(over) do
    redis.call('ZREM', SETTLED, member)
  end
end
