-- Creates a queued job, unless its idempotency key belongs to another one or a limit is reached.
-- ARGV: id, now, owner, priority, queue, limit of waiting jobs ('' for none), limit of the owner's
-- jobs ('' for none), Redis key of the idempotency entry ('' for none), hash of the body, prefix of
-- the oldest id whose record can still exist, number of record fields, record fields and values,
-- RQ's fields and values.
-- Returns the outcome, the id or number that belongs to it, and the position of a new job (or -1).
local id, now, owner, priority, queue = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local record, list = record_of(id), '@RQ_QUEUE@' .. queue
if redis.call('EXISTS', record) == 1 then return { 'created', id, -1 } end

if ARGV[8] ~= '' then
  local earlier = redis.call('HMGET', ARGV[8], 'job', 'body')
  if earlier[1] then
    local found = redis.call('HMGET', record_of(earlier[1]), 'state', 'delete_requested')
    if found[1] and not found[2] then
      return { earlier[2] == ARGV[9] and 'replayed' or 'conflict', earlier[1], -1 }
    end
  end
end

local waiting = redis.call('LLEN', list)
if ARGV[6] ~= '' and waiting >= tonumber(ARGV[6]) then return { 'queue_full', waiting, -1 } end
if ARGV[7] ~= '' then
  local active = 0
  for _, state in ipairs({ 'queued', 'running' }) do
    -- Ids of expired records stay in the index for a while, so older ids are not counted.
    active = active + redis.call('ZLEXCOUNT', indexes(owner, state)[2], '[' .. ARGV[10], '+')
  end
  if active >= tonumber(ARGV[7]) then return { 'owner_full', active, -1 } end
end

local fields = tonumber(ARGV[11])
redis.call('HSET', record, 'created_ms', clock_ms(), unpack(ARGV, 12, 11 + fields))
redis.call('EXPIRE', record, @RECORD_TTL_S@)
for _, state in ipairs({ 'all', 'queued' }) do
  for _, index in ipairs(indexes(owner, state)) do redis.call('ZADD', index, 0, id) end
end

redis.call('HSET', '@RQ_JOB@' .. id, unpack(ARGV, 12 + fields))
redis.call('SADD', '@RQ_QUEUES@', list)
local next_id, position = nil, waiting
if priority == '1' then
  -- Before the first job without priority, so that jobs with priority keep their order.
  for number, other in ipairs(redis.call('LRANGE', list, 0, -1)) do
    if redis.call('HGET', record_of(other), 'priority') ~= '1' then
      next_id, position = other, number - 1
      break
    end
  end
end
if next_id then
  redis.call('LINSERT', list, 'BEFORE', next_id, id)
else
  redis.call('RPUSH', list, id)
end

if ARGV[8] ~= '' then
  redis.call('HSET', ARGV[8], 'job', id, 'body', ARGV[9])
  redis.call('EXPIRE', ARGV[8], @IDEMPOTENCY_TTL_S@)
end
count('created', redis.call('HGET', record, 'shape'))
emit(id, 'state', now)
return { 'created', id, position }
