-- Notes that somebody looks for abandoned jobs.
-- ARGV: the ms without a look that count as a gap, and how long after one no lease is judged.
-- Returns the clock in ms, and whether a lease that has run out means that its holder has vanished:
-- after a gap (this server was away, or nobody was there to look) holders first get the time to
-- renew theirs.
local clock = clock_ms()
local known = redis.call('HMGET', '@RECOVERY@', 'looked_ms', 'gap_ms')
local gap = tonumber(known[2] or 0)
if known[1] and clock - tonumber(known[1]) > tonumber(ARGV[1]) then
  gap = clock
  redis.call('HSET', '@RECOVERY@', 'gap_ms', gap)
end
redis.call('HSET', '@RECOVERY@', 'looked_ms', clock)
return { clock, clock - gap < tonumber(ARGV[2]) and 0 or 1 }
