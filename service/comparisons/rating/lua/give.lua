-- Gives a rater the next item, unless the rater was given another one meanwhile.
-- KEYS: the comparison, the list of what the rater was given, the hash of all items.
-- ARGV: how many the rater was given before, item id, the item, the item with its owner.
-- Returns the state of the comparison (false if there is none), and 1 if the item was given.
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'running' or redis.call('LLEN', KEYS[2]) ~= tonumber(ARGV[1]) then return { state, 0 } end
redis.call('RPUSH', KEYS[2], ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[4])
return { state, 1 }
