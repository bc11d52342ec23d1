-- What every script begins with. Names between @ signs are put in by jobs/store/scripts.py.
--
-- A script is one step to Redis: of two rivals (a cancel and a claim, an old attempt and a new one)
-- exactly one wins. Each may be repeated after a lost answer: it finds its own token, its own id or
-- its own result, and changes nothing. Two do: a lease (renew, and a repeated claim) runs from the
-- latest call on, and webhook_take hands out other entries; those of the lost answer are due again
-- when their lease ends. Progress that is repeated after newer progress counts as news.

local ENDS = { succeeded = true, failed = true, cancelled = true }
local BOUNDS = { @BOUNDS@ }

local function clock_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function record_of(id) return '@RECORD@' .. id end

-- Adds to a counter of /metrics; in the scripts, so that each transition counts exactly once.
local function count(name, labels)
  redis.call('HINCRBYFLOAT', '@METRICS@', name .. '|' .. labels, 1)
end

local function observe(name, shape, seconds)
  local least = '+Inf'
  for _, bound in ipairs(BOUNDS) do
    if seconds <= bound then
      least = tostring(bound)
      break
    end
  end
  count(name, shape .. '|' .. least)
  redis.call('HINCRBYFLOAT', '@METRICS@', name .. '|' .. shape .. '|sum', seconds)
end

-- Appends to the job's event stream and wakes whoever follows it.
local function emit(id, kind, now)
  local record = redis.call('HMGET', record_of(id), 'state', 'attempts', 'progress')
  local stream = '@EVENTS@' .. id
  redis.call('XADD', stream, 'MAXLEN', '~', @EVENTS_KEPT@, '*', 'kind', kind, 'state', record[1],
    'attempts', record[2], 'at', now, 'progress', record[3] or '')
  redis.call('EXPIRE', stream, @RECORD_TTL_S@)
  redis.call('PUBLISH', '@CHANNEL@', id)
end

-- A job is in four indexes: all and by state, of everybody and of its owner.
local function indexes(owner, state)
  return { '@INDEX@' .. state, '@INDEX@' .. 'owner:' .. owner .. ':' .. state }
end

-- Changes the state, keeps the indexes in step, and does what an end brings with it.
local function move(id, from, to, now, code)
  local record = record_of(id)
  local known = redis.call('HMGET', record, 'owner', 'shape', 'webhook_url', 'delete_requested')
  redis.call('HSET', record, 'state', to)
  redis.call('HDEL', record, 'progress', 'missing_ms')
  for _, index in ipairs(indexes(known[1], from)) do redis.call('ZREM', index, id) end
  for _, index in ipairs(indexes(known[1], to)) do redis.call('ZADD', index, 0, id) end
  if ENDS[to] then
    redis.call('HSET', record, 'finished_at', now)
    redis.call('HDEL', record, 'lease_ms')
    -- RQ does this too when a delivery ends, but not for a worker that vanished.
    redis.call('EXPIRE', '@RQ_JOB@' .. id, @RQ_RESULT_TTL_S@)
    count('ended', known[2] .. '|' .. to .. '|' .. (code or ''))
    if known[3] then redis.call('ZADD', '@WEBHOOKS_DUE@', clock_ms(), id) end
    if known[4] then redis.call('ZADD', '@DELETIONS@', clock_ms(), id) end
  end
end

-- Writes RQ's own hash of the job anew and puts its id at the front of its queue: it had its turn.
local function deliver_again(id, queue, fields, first)
  local job, list = '@RQ_JOB@' .. id, '@RQ_QUEUE@' .. queue
  redis.call('DEL', job)
  redis.call('HSET', job, unpack(fields, first))
  redis.call('LREM', list .. ':intermediate', 0, id)
  redis.call('LREM', list, 0, id)
  redis.call('LPUSH', list, id)
end

-- One attempt has vanished. Returns true when that was one too often, and ends the job.
local function lose_attempt(id, most, failure, code, now)
  local record = record_of(id)
  count('lost', redis.call('HGET', record, 'shape'))
  if redis.call('HINCRBY', record, 'lost', 1) < most then return false end
  redis.call('HSET', record, 'failure', failure)
  redis.call('HDEL', record, 'token')
  move(id, 'running', 'failed', now, code)
  emit(id, 'state', now)
  return true
end
