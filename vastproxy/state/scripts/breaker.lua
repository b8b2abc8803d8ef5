-- What one instance says of a breaker, and how that stands with all of them; see redis_bus.py.
--
-- KEYS  1 sorted set: instance -> until when its vote counts, in Unix milliseconds of this server
--       2 hash: 'term', how often it was closed; 'until', when the time is over for which it is
--         left alone; 'reason', why
--       3 string: the instance that may probe
-- ARGV  1 what is said: 'open' (it has just opened), 'stay' (it is still so), 'look' (nothing),
--         'closed' (it has just closed), 'probe' (may I)
--       2 the instance; 3 the breaker; 4 the channel for all others
--       5 the term as far as the instance knows; 6 votes that make it open for all
--       7 milliseconds: 'open' and 'stay', how long it is left alone from now; 'probe', for how long
--         nobody else may
--       8 milliseconds that a vote counts beyond that; 9 why

local VOTES, STANDING, PROBER = KEYS[1], KEYS[2], KEYS[3]
local says, instance, known, quorum = ARGV[1], ARGV[2], tonumber(ARGV[5]), tonumber(ARGV[6])
local left, beyond = tonumber(ARGV[7]), tonumber(ARGV[8])

-- Keys live on a little: ends are in the data, and are judged there.
local GRACE = 60000
local DAY = 24 * 3600 * 1000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function whole(number)
  return string.format('%.0f', number)
end

redis.call('ZREMRANGEBYSCORE', VOTES, '-inf', whole(now))
local term = tonumber(redis.call('HGET', STANDING, 'term') or nil) or 0
local ends = tonumber(redis.call('HGET', STANDING, 'until') or nil) or 0
local reason = redis.call('HGET', STANDING, 'reason') or ''

-- Who has not heard yet that it was closed does not keep it open.
if says == 'open' or (says == 'stay' and known == term) then
  redis.call('ZADD', VOTES, whole(now + left + beyond), instance)
  local lasts = left + beyond + GRACE
  if redis.call('PTTL', VOTES) < lasts then
    redis.call('PEXPIRE', VOTES, whole(lasts))
  end
elseif says == 'look' then
  redis.call('ZREM', VOTES, instance)
end

if says == 'open' then
  ends, reason = math.max(ends, now + left), ARGV[9]
  redis.call('HSET', STANDING, 'until', whole(ends), 'reason', reason)
  redis.call('DEL', PROBER)
elseif says == 'closed' then
  term, ends, reason = term + 1, 0, ARGV[9]
  redis.call('HSET', STANDING, 'term', whole(term), 'until', 0, 'reason', reason)
  redis.call('DEL', VOTES, PROBER)
end
if says == 'open' or says == 'closed' then
  redis.call('PEXPIRE', STANDING, DAY)
end

local votes = redis.call('ZCARD', VOTES)
local granted = false
if says == 'probe' and known == term then
  if votes < quorum then
    -- It is open for those alone who found it so: none of them waits for another.
    granted = true
  elseif now >= ends then
    granted = redis.call('SET', PROBER, instance, 'NX', 'PX', whole(left)) and true
  end
end

local told = cjson.encode({
  name = ARGV[3], by = instance, says = says, votes = votes, term = term,
  left = math.max(0, ends - now), reason = reason, granted = granted,
})
if says == 'open' or says == 'closed' then
  -- Who may not publish may vote: the others read that a little later.
  redis.pcall('PUBLISH', ARGV[4], told)
end
return told
