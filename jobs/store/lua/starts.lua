-- When the waiting jobs of a queue will start. ARGV: queue, number of workers that serve it, how
-- many waiting jobs to look into.
-- Returns seconds as text: first what each further job adds, then the start of each place from 0
-- on. Ends early before a place that has a job in front of it of a kind never measured.
local queue, workers, ahead = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])

local paces = {}
local function expected(other)
  local known = redis.call('HMGET', record_of(other), 'shape', 'steps')
  local shape = known[1]
  if not shape then return nil end
  if paces[shape] == nil then
    local text = redis.call('HGET', '@PACE@', shape)
    local step_s, rest_s, texts_s = string.match(text or '', '^(%S+) (%S+) (%S+)$')
    paces[shape] = step_s and { tonumber(step_s), tonumber(rest_s) + tonumber(texts_s) } or false
  end
  local pace = paces[shape]
  return pace and pace[2] + tonumber(known[2]) * pace[1]
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
    if not seconds then return { '0' } end
    free_in[#free_in + 1] = seconds
  end
end
while #free_in < workers do free_in[#free_in + 1] = 0 end
table.sort(free_in)
local answer, sum = { '0', tostring(free_in[1]) }, 0
if ahead > 0 then
  for number, other in ipairs(redis.call('LRANGE', '@RQ_QUEUE@' .. queue, 0, ahead - 1)) do
    local seconds = expected(other)
    if not seconds then break end
    sum = sum + seconds
    free_in[1] = free_in[1] + seconds
    table.sort(free_in)
    answer[#answer + 1] = tostring(free_in[1])
    answer[1] = tostring(sum / number / #free_in)
  end
end
return answer
