-- Estimates when the waiting jobs of a queue will start.
-- ARGV: queue, number of workers that serve it, number of waiting jobs to examine.
-- Returns as text: how many jobs run or are being taken by a worker, then seconds: what each further
-- job adds, and the start of each position from 0 on. The list ends before a position that is behind
-- a job whose shape was never measured.
local queue, workers, examined = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local durations = {}

-- Returns the seconds that a job takes; nil if its shape was never measured.
local function expected(other)
  local known = redis.call('HMGET', record_of(other), 'shape', 'steps')
  local shape = known[1]
  if not shape then return nil end
  if durations[shape] == nil then
    local text = redis.call('HGET', '@DURATIONS@', shape)
    local step_s, rest_s, text_encoding_s = string.match(text or '', '^(%S+) (%S+) (%S+)')
    durations[shape] = step_s
      and { step_s = tonumber(step_s), other_s = tonumber(rest_s) + tonumber(text_encoding_s) }
      or false
  end
  local found = durations[shape]
  return found and found.other_s + tonumber(known[2]) * found.step_s
end

-- Returns the seconds that a running job has left; nil if that cannot be estimated.
local function left(other)
  local known = redis.call('HMGET', record_of(other), 'progress', 'started_ms')
  local progress = known[1] and cjson.decode(known[1])
  if progress and type(progress.seconds_left) == 'number' then return progress.seconds_left end
  local whole = expected(other)
  return whole and math.max(0, whole - math.max(0, clock_ms() - tonumber(known[2])) / 1000)
end

-- Each job goes to the worker that is free first, as in the queue.
local free_in, busy, is_known = {}, 0, true
local function occupy(other, estimate)
  if redis.call('HGET', record_of(other), 'queue') ~= queue then return end
  local seconds = estimate(other)
  busy, is_known = busy + 1, is_known and seconds
  free_in[#free_in + 1] = seconds
end
for _, other in ipairs(redis.call('ZRANGE', '@INDEX@running', 0, -1)) do occupy(other, left) end
-- A worker that takes a job removes it from the list some milliseconds before it claims it.
local list = '@RQ_QUEUE@' .. queue
if redis.call('ZCARD', '@INDEX@queued') > redis.call('LLEN', list) then
  for _, other in ipairs(redis.call('ZRANGE', '@INDEX@queued', 0, @MAX_TAKEN@)) do
    if not redis.call('LPOS', list, other) then occupy(other, expected) end
  end
end
if workers == 0 or not is_known then return { tostring(busy), '0' } end
while #free_in < workers do free_in[#free_in + 1] = 0 end
table.sort(free_in)
local answer, sum = { tostring(busy), '0', tostring(free_in[1]) }, 0
if examined > 0 then
  for number, other in ipairs(redis.call('LRANGE', list, 0, examined - 1)) do
    local seconds = expected(other)
    if not seconds then break end
    sum = sum + seconds
    free_in[1] = free_in[1] + seconds
    table.sort(free_in)
    answer[#answer + 1] = tostring(free_in[1])
    answer[2] = tostring(sum / number / #free_in)
  end
end
return answer
