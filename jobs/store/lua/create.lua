-- Creates queued jobs, all or none, unless their idempotency key belongs to others or a limit is
-- reached. ARGV: number of jobs, now, owner, priority, queue, limit of waiting jobs ('' for none),
-- limit of the owner's jobs ('' for none), Redis key of the idempotency entry ('' for none), hash of
-- the body, prefix of the oldest id whose record can still exist; then for each job: id, number of
-- record fields, record fields and values, number of RQ's fields, RQ's fields and values.
-- Returns the outcome, the ids or number that belong to it, and the position of the first job (or -1).
local jobs, now, owner, priority, queue = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local list = '@RQ_QUEUE@' .. queue
if redis.call('EXISTS', record_of(ARGV[11])) == 1 then return { 'created', ARGV[11], -1 } end

if ARGV[8] ~= '' then
  local earlier = redis.call('HMGET', ARGV[8], 'job', 'body')
  if earlier[1] then
    local first = string.match(earlier[1], '^%S+')
    local found = redis.call('HMGET', record_of(first), 'state', 'delete_requested')
    if found[1] and not found[2] then
      if earlier[2] ~= ARGV[9] then return { 'conflict', first, -1 } end
      return { 'replayed', earlier[1], -1 }
    end
  end
end

local waiting = redis.call('LLEN', list)
if ARGV[6] ~= '' and waiting + jobs > tonumber(ARGV[6]) then return { 'queue_full', waiting, -1 } end
if ARGV[7] ~= '' then
  local active = 0
  for _, state in ipairs({ 'queued', 'running' }) do
    -- Ids of expired records stay in the index for a while, so older ids are not counted.
    active = active + redis.call('ZLEXCOUNT', indexes(owner, state)[2], '[' .. ARGV[10], '+')
  end
  if active + jobs > tonumber(ARGV[7]) then return { 'owner_full', active, -1 } end
end

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

redis.call('SADD', '@RQ_QUEUES@', list)
local made, at = {}, 11
for _ = 1, jobs do
  local id, fields = ARGV[at], tonumber(ARGV[at + 1])
  local record = record_of(id)
  redis.call('HSET', record, 'created_ms', clock_ms(), unpack(ARGV, at + 2, at + 1 + fields))
  redis.call('EXPIRE', record, @RECORD_TTL_S@)
  for _, state in ipairs({ 'all', 'queued' }) do
    for _, index in ipairs(indexes(owner, state)) do redis.call('ZADD', index, 0, id) end
  end
  at = at + 2 + fields
  local rq_fields = tonumber(ARGV[at])
  redis.call('HSET', '@RQ_JOB@' .. id, unpack(ARGV, at + 1, at + rq_fields))
  at = at + 1 + rq_fields
  if next_id then
    redis.call('LINSERT', list, 'BEFORE', next_id, id)
  else
    redis.call('RPUSH', list, id)
  end
  count('created', redis.call('HGET', record, 'shape'))
  emit(id, 'state', now)
  made[#made + 1] = id
end

if ARGV[8] ~= '' then
  redis.call('HSET', ARGV[8], 'job', table.concat(made, ' '), 'body', ARGV[9])
  redis.call('EXPIRE', ARGV[8], @IDEMPOTENCY_TTL_S@)
end
return { 'created', made[1], position }
