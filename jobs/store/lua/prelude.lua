-- Defines what all scripts share; each script is prefixed with this file.
-- jobs/store/scripts.py substitutes the names between @ signs.
--
-- Redis runs a script atomically: of two competing calls (a cancel and a claim, an old attempt and
-- a new one) exactly one takes effect. A call may be repeated after a lost response: the script
-- finds its own token, its own id or its own result, and changes nothing. There are two exceptions: a
-- lease (renew, and a repeated claim) runs from the latest call on, and webhook_take returns other
-- entries (those of the lost response are due again when their lease ends). Progress that is
-- repeated after newer progress is written and announced again, and a repeated preview counts twice.

local ENDS = { succeeded = true, failed = true, cancelled = true }
local BOUNDS = { @BOUNDS@ }

local function clock_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Returns this server's time as the records have it: ISO 8601, in UTC. Hosts' clocks may be days off,
-- and retention counts from the ends of jobs. (The days are split by the civil calendar's cycle of
-- 400 years, in years that begin in March.)
local function stamp()
  local time = redis.call('TIME')
  local days, seconds = math.floor(time[1] / 86400) + 719468, time[1] % 86400
  local cycle = math.floor(days / 146097)
  local day = days - cycle * 146097
  local year = math.floor((day - math.floor(day / 1460) + math.floor(day / 36524)
    - math.floor(day / 146096)) / 365)
  day = day - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local month = math.floor((5 * day + 2) / 153)
  day = day - math.floor((153 * month + 2) / 5) + 1
  month = month < 10 and month + 3 or month - 9
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06d+00:00',
    year + cycle * 400 + (month <= 2 and 1 or 0), month, day,
    math.floor(seconds / 3600), math.floor(seconds / 60) % 60, seconds % 60, time[2])
end

local function record_of(id) return '@RECORD@' .. id end

-- Increments a counter of /metrics, in the scripts, so that each transition counts exactly once.
local function count(name, labels)
  redis.call('HINCRBYFLOAT', '@METRICS@', name .. '|' .. labels, 1)
end

-- Adds to the current minute of the series that GET /series shows, for the mode in a shape.
local function tally(shape, what, amount)
  local minute = math.floor(redis.call('TIME')[1] / 60)
  local key = '@SERIES@' .. math.floor(minute / 60)
  local mode = string.match(shape, '^[^|]*|([^|]*)') or ''
  redis.call('HINCRBYFLOAT', key, (minute % 60) .. '|' .. mode .. '|' .. what, amount)
  redis.call('EXPIRE', key, @SERIES_TTL_S@)
end

-- Keeps a failed job in the list of the latest failures, which is bounded by time and number.
local function list_failure(id)
  local clock = clock_ms()
  redis.call('ZADD', '@FAILURES@', clock, id)
  redis.call('ZREMRANGEBYSCORE', '@FAILURES@', '-inf', clock - @FAILURES_TTL_S@ * 1000)
  redis.call('ZREMRANGEBYRANK', '@FAILURES@', 0, -@MOST_FAILURES@ - 1)
end

-- Adds a value to a histogram of /metrics, and to the series.
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
  tally(shape, name, 1)
  tally(shape, name .. '_s', seconds)
end

-- Appends to the job's event stream and publishes the job's id to its readers.
local function emit(id, kind, now)
  local record = redis.call('HMGET', record_of(id), 'state', 'attempts', 'progress', 'preview')
  local stream = '@EVENTS@' .. id
  redis.call('XADD', stream, 'MAXLEN', '~', @EVENTS_KEPT@, '*', 'kind', kind, 'state', record[1],
    'attempts', record[2], 'at', now, 'progress', record[3] or '', 'preview', record[4] or '')
  redis.call('EXPIRE', stream, @RECORD_TTL_S@)
  redis.call('PUBLISH', '@CHANNEL@', id)
end

-- Returns two of the four indexes of a job (all and by state, of everybody and of its owner).
local function indexes(owner, state)
  return { '@INDEX@' .. state, '@INDEX@' .. 'owner:' .. owner .. ':' .. state }
end

-- Changes the state and the indexes, and deletes what only a running job has. At an end, it also
-- sets the expiry of RQ's hash, counts, and enqueues the webhook and the requested deletion.
local function move(id, from, to, now, code)
  local record = record_of(id)
  local known = redis.call('HMGET', record, 'owner', 'shape', 'webhook_url', 'delete_requested')
  redis.call('HSET', record, 'state', to)
  redis.call('HDEL', record, 'progress', 'preview', 'missing_ms')
  redis.call('DEL', '@PREVIEW@' .. id)
  for _, index in ipairs(indexes(known[1], from)) do redis.call('ZREM', index, id) end
  for _, index in ipairs(indexes(known[1], to)) do redis.call('ZADD', index, 0, id) end
  if ENDS[to] then
    redis.call('HSET', record, 'finished_at', stamp())
    redis.call('HDEL', record, 'lease_ms')
    -- RQ does this too when a delivery ends, but not if the worker was lost.
    redis.call('EXPIRE', '@RQ_JOB@' .. id, @RQ_RESULT_TTL_S@)
    count('ended', known[2] .. '|' .. to .. '|' .. (code or ''))
    tally(known[2], to, 1)
    if to == 'failed' then list_failure(id) end
    if known[3] then redis.call('ZADD', '@WEBHOOKS_DUE@', clock_ms(), id) end
    if known[4] then redis.call('ZADD', '@DELETIONS@', clock_ms(), id) end
  end
end

-- Writes RQ's hash of the job again and puts its id at the front of its queue, as it waited before.
local function deliver_again(id, queue, fields, first)
  local job, list = '@RQ_JOB@' .. id, '@RQ_QUEUE@' .. queue
  redis.call('DEL', job)
  redis.call('HSET', job, unpack(fields, first))
  redis.call('LREM', list .. ':intermediate', 0, id)
  redis.call('LREM', list, 0, id)
  redis.call('LPUSH', list, id)
end

-- Counts an attempt that was `lost` with its worker, or `returned` by a worker that is at fault. If
-- there were too many of its kind, it fails the job and returns true.
local function spend_attempt(id, kind, most, failure, code, now)
  local record = record_of(id)
  count(kind, redis.call('HGET', record, 'shape'))
  if redis.call('HINCRBY', record, kind, 1) < most then return false end
  redis.call('HSET', record, 'failure', failure)
  redis.call('HDEL', record, 'token')
  move(id, 'running', 'failed', now, code)
  emit(id, 'state', now)
  return true
end
