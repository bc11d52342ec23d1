-- Renews the lease of an attempt. ARGV: id, now, token, length of a lease in ms.
-- Returns 'ok', or 'cancel' if the job is to be cancelled. If the attempt does not own the job, it
-- returns the reason: 'missing', 'superseded' or the state.
local record = record_of(ARGV[1])
local known = redis.call('HMGET', record, 'state', 'token', 'cancel_requested')
if not known[1] then return 'missing' end
if known[2] ~= ARGV[3] then return 'superseded' end
if known[1] ~= 'running' then return known[1] end
redis.call('HSET', record, 'lease_ms', clock_ms() + tonumber(ARGV[4]))
return known[3] == '1' and 'cancel' or 'ok'
