-- Stores a rater's answer to an item, once; it is then the one that can be taken back.
-- KEYS: the comparison, the rater's answers, the rater's progress.
-- ARGV: item id, answer as JSON, the counters that it adds to.
-- Returns the state of the comparison (false if there is none), whether the answer was stored, and
-- the progress.
local state = redis.call('HGET', KEYS[1], 'state')
local stored = 0
if state == 'running' and redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 1 then
  stored = 1
  redis.call('HSET', KEYS[3], 'last', ARGV[1])
  for at = 3, #ARGV do redis.call('HINCRBY', KEYS[3], ARGV[at], 1) end
end
return { state, stored, redis.call('HGETALL', KEYS[3]) }
