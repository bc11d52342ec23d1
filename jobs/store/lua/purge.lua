-- Deletes everything about a job. ARGV: id, now.
-- Returns 'missing', 'purged', or 'marked': a running job is cancelled first, and deleted later.
local id, now = ARGV[1], ARGV[2]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'owner', 'queue')
-- A record of another version may lack some of these fields; it is deleted all the same.
local state, owner, queue = known[1], known[2] or '', known[3] or ''
if not state then
  redis.call('ZREM', '@DELETIONS@', id)
  return 'missing'
end
if state == 'running' then
  redis.call('HSET', record, 'cancel_requested', '1', 'delete_requested', '1')
  redis.call('DEL', '@PREVIEW@' .. id)
  redis.call('PUBLISH', '@CHANNEL@', id)
  return 'marked'
end
if state == 'queued' then
  redis.call('LREM', '@RQ_QUEUE@' .. queue, 1, id)
  redis.call('LREM', '@RQ_QUEUE@' .. queue .. ':intermediate', 0, id)
  local shape = redis.call('HGET', record, 'shape') or ''
  count('ended', shape .. '|cancelled|')
  tally(shape, 'cancelled', 1)
end
for _, each in ipairs({ state, 'all' }) do
  for _, index in ipairs(indexes(owner, each)) do redis.call('ZREM', index, id) end
end
redis.call('ZREM', '@DELETIONS@', id)
redis.call('ZREM', '@WEBHOOKS_DUE@', id)
redis.call('ZREM', '@FAILURES@', id)
redis.call('DEL', record, '@EVENTS@' .. id, '@PREVIEW@' .. id, '@WEBHOOK@' .. id, '@RQ_JOB@' .. id)
-- RQ's results of ended deliveries: their tracebacks must not outlive the job.
redis.call('DEL', '@RQ_RESULTS@' .. id)
for _, registry in ipairs({ '@RQ_FINISHED@', '@RQ_FAILED@' }) do
  redis.call('ZREM', registry .. queue, id)
end
redis.call('PUBLISH', '@CHANNEL@', id)
return 'purged'
