-- Starts an attempt. ARGV: id, now, token, worker, length of a lease in ms.
-- Returns the state after the call, or 'missing', or 'held'; and the number of the attempt. Or
-- 'format' and the record's format, if that is another than this version's: nothing was changed.
local id, now, token = ARGV[1], ARGV[2], ARGV[3]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'token', 'attempts', 'shape', 'created_ms',
  'format')
local state, attempts = known[1], tonumber(known[3])
if not state then return { 'missing', 0 } end
if known[6] and known[6] ~= '@FORMAT@' then return { 'format', known[6] } end
local clock = clock_ms()
local lease = clock + tonumber(ARGV[5])
if state == 'running' then
  -- Even if the other attempt's lease has expired: only recovery ends it (look.lua, put_back.lua).
  if known[2] ~= token then return { 'held', attempts } end
  redis.call('HSET', record, 'lease_ms', lease)
  return { state, attempts }
end
if state ~= 'queued' then return { state, attempts } end
if attempts == 0 then observe('wait', known[4], math.max(0, clock - tonumber(known[5])) / 1000) end
move(id, state, 'running', now)
redis.call('HSET', record, 'token', token, 'started_at', stamp(), 'started_ms', clock, 'worker', ARGV[4],
  'attempts', attempts + 1, 'lease_ms', lease)
count('claimed', known[4])
emit(id, 'state', now)
return { 'running', attempts + 1 }
