-- Writes the progress or the end of an attempt.
-- ARGV: id, now, token, target state, code of a failure, then fields and values.
-- Progress that equals the stored one is not announced again.
-- Returns 'ok', 'missing', 'superseded', or the final state that forbids the write.
-- The functions that are not defined here are in prelude.lua.
local id, now, token, target = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'token', 'shape', 'started_ms')
if not known[1] then return 'missing' end
if known[2] ~= token then return 'superseded' end
if known[1] ~= 'running' then
  -- The token is kept after the end, so that a repetition of the same write is recognised.
  return known[1] == target and 'ok' or known[1]
end
if target == 'running' then
  if redis.call('HGET', record, ARGV[6]) == ARGV[7] then return 'ok' end
else
  move(id, 'running', target, now, ARGV[5])
end
if #ARGV > 5 then redis.call('HSET', record, unpack(ARGV, 6)) end
if target == 'succeeded' then
  observe('service', known[3], math.max(0, clock_ms() - tonumber(known[4])) / 1000)
end
emit(id, target == 'running' and 'progress' or 'state', now)
return 'ok'
