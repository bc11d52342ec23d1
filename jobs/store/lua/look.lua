-- Records that a process looks for abandoned jobs, and decides whether it may judge leases.
-- ARGV: how many ms without a look count as a gap; for how many ms after a gap no lease is judged.
-- Returns the clock in ms, and 1 if an expired lease means that its holder is lost. It is 0 after a
-- gap (this server was unreachable, or no process was running), when holders first get the time to
-- renew their leases. A clock that was set back or ahead is a gap, too: leases were given by the time
-- before, and only those that are renewed after it can be judged.
local clock = clock_ms()
local known = redis.call('HMGET', '@RECOVERY@', 'looked_ms', 'gap_ms')
local gap = tonumber(known[2] or 0)
local passed = known[1] and clock - tonumber(known[1]) or 0
if passed > tonumber(ARGV[1]) or passed < 0 then
  gap = clock
  redis.call('HSET', '@RECOVERY@', 'gap_ms', gap)
end
redis.call('HSET', '@RECOVERY@', 'looked_ms', clock)
return { clock, clock - gap < tonumber(ARGV[2]) and 0 or 1 }
