-- Where waiting jobs stand. ARGV: queue, number of workers that serve it, how many waiting jobs to
-- look into at most, ids.
-- Returns for each id its place, counted from 0 (-1: not in this queue), and the seconds until its
-- start as text ('' when there is no worker, or a job before it is of a kind never measured).
local queue, workers, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local list = '@RQ_QUEUE@' .. queue
local answer, last = {}, -1
for i = 4, #ARGV do
  local place = redis.call('LPOS', list, ARGV[i]) or -1
  answer[#answer + 1] = { place, '' }
  last = math.max(last, place)
end
if last < 0 or workers < 1 then return answer end

local paces = {}
local function expected(other)
  local known = redis.call('HMGET', record_of(other), 'shape', 'steps')
  local shape = known[1]
  if not shape then return nil end
  if paces[shape] == nil then
    local text = redis.call('HGET', '@PACE@', shape)
    local step_s, rest_s = string.match(text or '', '^(%S+) (%S+)$')
    paces[shape] = step_s and { tonumber(step_s), tonumber(rest_s) } or false
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

-- Each job goes to the worker that is free first, as the queue will do it. starts[1] is the start
-- of place 0; the table ends where nothing is known.
local function walk()
  local free_in, starts = {}, {}
  for _, other in ipairs(redis.call('ZRANGE', '@INDEX@running', 0, -1)) do
    if redis.call('HGET', record_of(other), 'queue') == queue then
      local seconds = left(other)
      if not seconds then return starts end
      free_in[#free_in + 1] = seconds
    end
  end
  while #free_in < workers do free_in[#free_in + 1] = 0 end
  table.sort(free_in)
  starts[1] = free_in[1]
  local ahead = math.min(last, most)
  if ahead > 0 then
    local sum = 0
    for _, other in ipairs(redis.call('LRANGE', list, 0, ahead - 1)) do
      local seconds = expected(other)
      if not seconds then return starts end
      sum = sum + seconds
      free_in[1] = free_in[1] + seconds
      table.sort(free_in)
      starts[#starts + 1] = free_in[1]
    end
    -- Further behind, all are taken to be like those that were looked into.
    starts.each = sum / ahead / #free_in
  end
  return starts
end

local starts = walk()
for _, each in ipairs(answer) do
  local place = each[1]
  local seconds = place >= 0 and starts[place + 1]
  if place > most and starts.each then
    seconds = starts[most + 1] + (place - most) * starts.each
  end
  if seconds then each[2] = tostring(seconds) end
end
return answer
