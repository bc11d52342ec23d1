-- Ends a running attempt without ending the job: its worker releases it, is at fault, or is lost.
-- ARGV: id, now, token ('' for recovery, which takes only a job whose lease has expired), as what
-- the attempt counts ('lost', 'returned', or '' for neither), limit of such attempts, the failure
-- and its code for reaching that limit, RQ's fields and values.
-- Returns the state after the call, or 'missing', 'held' (the lease has not expired), 'superseded'
-- (a newer attempt owns the job), or, without a token, 'settled' if the job is not running.
local id, now, token = ARGV[1], ARGV[2], ARGV[3]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'token', 'lease_ms', 'cancel_requested', 'queue',
  'shape')
local state = known[1]
if not state then return 'missing' end
if state ~= 'running' then return token == '' and 'settled' or state end
if token ~= '' then
  if known[2] ~= token then return 'superseded' end
elseif known[3] then
  -- No lease ends later than its length from now, unless the clock was set back since; its holder
  -- would have renewed it.
  local left = tonumber(known[3]) - clock_ms()
  if left > 0 and left <= @LEASE_MS@ then return 'held' end
end
if ARGV[4] ~= '' then
  if spend_attempt(id, ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7], now) then return 'failed' end
else
  count('released', known[6])
end
redis.call('HDEL', record, 'token', 'lease_ms', 'started_at', 'started_ms', 'worker')
if known[4] == '1' then
  move(id, state, 'cancelled', now)
  emit(id, 'state', now)
  return 'cancelled'
end
move(id, state, 'queued', now)
deliver_again(id, known[5], ARGV, 8)
emit(id, 'state', now)
return 'queued'
