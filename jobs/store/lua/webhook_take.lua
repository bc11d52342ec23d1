-- Leases due entries of the outbox: each is due again when the lease ends, whoever holds it.
-- ARGV: most entries, milliseconds of the lease.
-- Returns ids and, after each, its lease: the score the entry has while it is held.
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
