-- Leases due entries of the outbox; each is due again when its lease ends.
-- ARGV: maximum number of entries, length of the lease in ms.
-- Returns ids, each followed by its lease: the score of the entry during the lease.
local now = clock_ms()
local lease = string.format('%d', now + ARGV[2])
local taken = {}
local due = redis.call('ZRANGEBYSCORE', '@WEBHOOKS_DUE@', '-inf', now, 'LIMIT', 0, ARGV[1])
for _, id in ipairs(due) do
  redis.call('ZADD', '@WEBHOOKS_DUE@', lease, id)
  taken[#taken + 1] = id
  taken[#taken + 1] = lease
end
return taken
