-- Puts a queued job that is in no queue back into its queue: a worker took it and died before it
-- claimed it. The job must be missing for a while, as every job is in no queue for a moment.
-- ARGV: id, for how many ms it must be missing, RQ's fields and values.
-- Returns 1 if it was put back, otherwise 0.
local id = ARGV[1]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'queue', 'missing_ms')
if known[1] ~= 'queued' then return 0 end
if redis.call('LPOS', '@RQ_QUEUE@' .. known[2], id) then
  redis.call('HDEL', record, 'missing_ms')
  return 0
end
local clock = clock_ms()
-- Also if the clock was set back since: the job would be missing for hours.
if not known[3] or tonumber(known[3]) > clock then
  redis.call('HSET', record, 'missing_ms', clock)
  return 0
end
if clock - tonumber(known[3]) < tonumber(ARGV[2]) then return 0 end
redis.call('HDEL', record, 'missing_ms')
deliver_again(id, known[2], ARGV, 3)
return 1
