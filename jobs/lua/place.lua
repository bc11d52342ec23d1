-- Where a waiting job stands. ARGV: id, number of workers that serve its queue.
-- Returns its place, counted from 0 (-1: in no queue), and the seconds until its start as text
-- ('' when a job before it is of a kind that was never measured).
local id, workers = ARGV[1], tonumber(ARGV[2])
local queue = redis.call('HGET', record_of(id), 'queue')
if not queue then return { -1, '' } end
local list = '@RQ_QUEUE@' .. queue
local place = redis.call('LPOS', list, id)
if not place then return { -1, '' } end
if workers < 1 then return { place, '' } end

local function expected(other)
  local known = redis.call('HMGET', record_of(other), 'shape', 'steps')
  local pace = known[1] and redis.call('HGET', '@PACE@', known[1])
  if not pace then return nil end
  local step_s, rest_s = pace:match('^(%S+) (%S+)$')
  return tonumber(rest_s) + tonumber(known[2]) * tonumber(step_s)
end

local function left(other)
  local known = redis.call('HMGET', record_of(other), 'progress', 'started_ms')
  local progress = known[1] and cjson.decode(known[1])
  if progress and type(progress.seconds_left) == 'number' then return progress.seconds_left end
  local whole = expected(other)
  return whole and math.max(0, whole - (clock_ms() - tonumber(known[2])) / 1000)
end

-- Each job goes to the worker that is free first, as the queue will do it.
local free_in = {}
for _, other in ipairs(redis.call('ZRANGE', '@INDEX@running', 0, -1)) do
  if redis.call('HGET', record_of(other), 'queue') == queue then
    local seconds = left(other)
    if not seconds then return { place, '' } end
    free_in[#free_in + 1] = seconds
  end
end
while #free_in < workers do free_in[#free_in + 1] = 0 end
table.sort(free_in)
if place > 0 then
  for _, other in ipairs(redis.call('LRANGE', list, 0, place - 1)) do
    local seconds = expected(other)
    if not seconds then return { place, '' } end
    free_in[1] = free_in[1] + seconds
    table.sort(free_in)
  end
end
return { place, tostring(free_in[1]) }
