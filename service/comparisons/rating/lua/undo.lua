-- Takes back the rater's last answer, which can be taken back once.
-- KEYS: the comparison, the rater's answers, the rater's progress.
-- Returns the state of the comparison (false if there is none), the item ('' if there is no such
-- answer), and the progress.
local state = redis.call('HGET', KEYS[1], 'state')
local last = redis.call('HGET', KEYS[3], 'last')
if state == 'running' and last then
  local answer = cjson.decode(redis.call('HGET', KEYS[2], last))
  redis.call('HDEL', KEYS[2], last)
  redis.call('HDEL', KEYS[3], 'last')
  local kind = answer.kind == 'training' and 'training' or 'done'
  redis.call('HINCRBY', KEYS[3], kind, -1)
  if answer.skipped and kind == 'done' then redis.call('HINCRBY', KEYS[3], 'skipped', -1) end
  redis.call('HINCRBY', KEYS[3], 'undone', 1)
  return { state, last, redis.call('HGETALL', KEYS[3]) }
end
return { state, '', redis.call('HGETALL', KEYS[3]) }
