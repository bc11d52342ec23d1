-- Ends the lease of an entry of the outbox.
-- ARGV: id, lease, outcome ('delivered', 'retried', 'given_up', or 'postponed' for no try at all),
-- milliseconds until the next try, fields and values of the outcome.
-- Returns 'ok', 'missing' (the job no longer exists, and the entry is removed), or 'superseded'
-- (the lease has ended).
local id, outcome = ARGV[1], ARGV[3]
local held = redis.call('ZSCORE', '@WEBHOOKS_DUE@', id)
if not held or tonumber(held) ~= tonumber(ARGV[2]) then return 'superseded' end
local record, kept = record_of(id), '@WEBHOOK@' .. id
local known = redis.call('HMGET', record, 'shape', 'delete_requested')
if not known[1] or known[2] then
  redis.call('ZREM', '@WEBHOOKS_DUE@', id)
  redis.call('DEL', kept)
  return 'missing'
end
if outcome == 'retried' or outcome == 'postponed' then
  -- At least 1 ms later and not equal to this lease, because its score identifies a lease.
  local due = clock_ms() + math.max(1, ARGV[4])
  if due == tonumber(held) then due = due + 1 end
  redis.call('ZADD', '@WEBHOOKS_DUE@', string.format('%d', due), id)
else
  redis.call('ZREM', '@WEBHOOKS_DUE@', id)
end
if outcome == 'postponed' then return 'ok' end
redis.call('HINCRBY', kept, 'tries', 1)
redis.call('HDEL', kept, 'last_status', 'last_error')
redis.call('HSET', kept, 'state', outcome == 'retried' and 'pending' or outcome, unpack(ARGV, 5))
redis.call('PEXPIRE', kept, redis.call('PTTL', record))
count('webhook', known[1] .. '|' .. outcome)
return 'ok'
