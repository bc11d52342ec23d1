-- Cancels a queued job, or asks the worker of a running one to stop.
-- ARGV: id, now. Returns the state after the call, or 'missing'.
local id, now = ARGV[1], ARGV[2]
local record = record_of(id)
local state = redis.call('HGET', record, 'state')
if not state then return 'missing' end
if state == 'queued' then
  redis.call('HSET', record, 'cancel_requested', '1')
  move(id, state, 'cancelled', now)
  -- If the id is still in the queue, remove it and RQ's hash. Otherwise a worker has just taken the
  -- id: it may still read RQ's hash, and its claim will be refused. Or that worker has died, and
  -- nothing else will remove the entry of the intermediate list.
  local list = '@RQ_QUEUE@' .. redis.call('HGET', record, 'queue')
  redis.call('LREM', list .. ':intermediate', 0, id)
  if redis.call('LREM', list, 1, id) > 0 then redis.call('DEL', '@RQ_JOB@' .. id) end
  emit(id, 'state', now)
  return 'cancelled'
end
if state == 'running' and redis.call('HGET', record, 'cancel_requested') ~= '1' then
  redis.call('HSET', record, 'cancel_requested', '1')
  emit(id, 'state', now)
end
return state
