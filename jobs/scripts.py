"""The Lua scripts through which every change of a job's state goes.

Redis runs a script as one step, so of two rivals (a cancel and a claim, an old attempt and a new
one) exactly one wins. Each script may be repeated after a lost answer: a repeated call finds its
own token or its own result and changes nothing.

A record stays in two indexes, one of all jobs and one per state; `move` keeps the second in step.
"""

_MOVE = """
local function move(record, prefix, id, from, to, now)
  redis.call('HSET', record, 'state', to)
  redis.call('ZREM', prefix .. from, id)
  redis.call('ZADD', prefix .. to, 0, id)
  if to ~= 'running' then
    redis.call('HSET', record, 'finished_at', now)
    redis.call('HDEL', record, 'progress')
  end
end
"""

CLAIM = (
    _MOVE
    + """
-- KEYS: record. ARGV: id, index prefix, now, token, most attempts, failure when they are used up.
-- Returns the state after the call and the number of the attempt.
local record, id, prefix, now, token = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local state = redis.call('HGET', record, 'state')
if not state then return {'missing', 0} end
local attempts = tonumber(redis.call('HGET', record, 'attempts'))
if state == 'running' and redis.call('HGET', record, 'token') == token then
  return {state, attempts}
end
if state ~= 'queued' and state ~= 'running' then return {state, attempts} end
if redis.call('HGET', record, 'cancel_requested') == '1' then
  move(record, prefix, id, state, 'cancelled', now)
  redis.call('HDEL', record, 'token')
  return {'cancelled', attempts}
end
if attempts >= tonumber(ARGV[5]) then
  move(record, prefix, id, state, 'failed', now)
  redis.call('HDEL', record, 'token')
  redis.call('HSET', record, 'failure', ARGV[6])
  return {'failed', attempts}
end
move(record, prefix, id, state, 'running', now)
redis.call('HSET', record, 'token', token, 'started_at', now, 'attempts', attempts + 1)
redis.call('HDEL', record, 'progress')
return {'running', attempts + 1}
"""
)

WRITE = (
    _MOVE
    + """
-- KEYS: record. ARGV: id, index prefix, now, token, target state, then fields and values.
-- Returns 'ok', 'missing', 'superseded', or the terminal state that forbids the write.
local record, id, prefix, now, token, target = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local state = redis.call('HGET', record, 'state')
if not state then return 'missing' end
if redis.call('HGET', record, 'token') ~= token then return 'superseded' end
if state ~= 'running' then
  if state == target then return 'ok' end
  return state
end
if target ~= 'running' then move(record, prefix, id, state, target, now) end
for i = 6, #ARGV, 2 do redis.call('HSET', record, ARGV[i], ARGV[i + 1]) end
return 'ok'
"""
)

CANCEL = (
    _MOVE
    + """
-- KEYS: record, RQ's hash of the job. ARGV: id, index prefix, now, prefix of RQ's queue keys.
-- Returns the state after the call, or 'missing'.
local record, id, prefix, now = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local state = redis.call('HGET', record, 'state')
if not state then return 'missing' end
if state == 'queued' then
  move(record, prefix, id, state, 'cancelled', now)
  redis.call('HSET', record, 'cancel_requested', '1')
  -- Still waiting: take it out of the queue. Otherwise a worker has just taken it, needs RQ's
  -- hash, and will be refused by its claim.
  local queue = ARGV[4] .. redis.call('HGET', record, 'queue')
  if redis.call('LREM', queue, 1, id) > 0 then redis.call('DEL', KEYS[2]) end
  return 'cancelled'
end
if state == 'running' then redis.call('HSET', record, 'cancel_requested', '1') end
return state
"""
)
