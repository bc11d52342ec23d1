-- ARGV: id, now, token, worker, length of a lease in ms, most lost attempts, the failure and its
-- code when they are used up.
-- Returns the state after the call, or 'missing', or 'held'; and the number of the attempt.
local id, now, token = ARGV[1], ARGV[2], ARGV[3]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'token', 'attempts', 'lease_ms', 'shape',
  'created_ms', 'delete_requested')
local state, attempts = known[1], tonumber(known[3])
if not state then return { 'missing', 0 } end
local clock = clock_ms()
if state == 'running' then
  if known[2] == token then return { state, attempts } end
  if known[4] and clock < tonumber(known[4]) then return { 'held', attempts } end
  if lose_attempt(id, tonumber(ARGV[6]), ARGV[7], ARGV[8], now) then
    return { 'failed', attempts }
  end
elseif state ~= 'queued' then
  return { state, attempts }
end
if redis.call('HGET', record, 'cancel_requested') == '1' then
  redis.call('HDEL', record, 'token')
  move(id, state, 'cancelled', now)
  emit(id, 'state', now)
  return { 'cancelled', attempts }
end
if attempts == 0 then observe('wait', known[5], (clock - tonumber(known[6])) / 1000) end
move(id, state, 'running', now)
redis.call('HSET', record, 'token', token, 'started_at', now, 'started_ms', clock, 'worker', ARGV[4],
  'attempts', attempts + 1, 'lease_ms', clock + tonumber(ARGV[5]))
count('claimed', known[5])
emit(id, 'state', now)
return { 'running', attempts + 1 }
