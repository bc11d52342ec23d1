-- Stores a rater's answer to an item, once; it is then the one that can be taken back.
-- KEYS: the comparison, the rater's answers, the rater's progress, the hash of all items, the pairs.
-- ARGV: item id, rater id, whether it is a skip (1 or 0), the response as JSON.
-- Returns the state of the comparison (false if there is none), what became of the answer (a value of
-- `Outcome` in votes.py), and the progress.
local state = redis.call('HGET', KEYS[1], 'state')

-- As `Pair.state` has it: READY.
local function is_made(half)
  local unfit = { queued = true, running = true, failed = true, cancelled = true }
  return half and half.copy and half.copy ~= cjson.null and not unfit[half.state]
end

local function is_ready(pair_id)
  local text = redis.call('HGET', KEYS[5], pair_id)
  if not text then return false end
  local pair = cjson.decode(text)
  local has_failed = pair.failure and pair.failure ~= cjson.null
  return not has_failed and is_made(pair.reference) and is_made(pair.candidate)
end

local function answer()
  local owned = redis.call('HGET', KEYS[4], ARGV[1])
  if not owned then return 'unknown' end
  local rater, place, pair_id, kind, side, again =
    string.match(owned, '^(%S+) (%d+) %S+ (%S+) (%S+) (%S+) (%S+)$')
  if rater ~= ARGV[2] then return 'foreign' end
  if not is_ready(pair_id) then return 'left_out' end
  if state ~= 'running' then return 'stopped' end
  local text = string.format(
    '{"item":"%s","number":%d,"pair_id":"%s","kind":"%s","candidate_left":%s,"is_repeat":%s,%s',
    ARGV[1], place + 1, pair_id, kind, tostring(side == 'left'), tostring(again == '1'),
    string.sub(ARGV[4], 2))
  if redis.call('HSETNX', KEYS[2], ARGV[1], text) == 0 then
    -- A call that is repeated because its reply was lost has stored this very text.
    return redis.call('HGET', KEYS[2], ARGV[1]) == text and 'stored' or 'answered'
  end
  redis.call('HSET', KEYS[3], 'last', ARGV[1])
  redis.call('HINCRBY', KEYS[3], kind == 'training' and 'training' or 'done', 1)
  if ARGV[3] == '1' and kind ~= 'training' then redis.call('HINCRBY', KEYS[3], 'skipped', 1) end
  return 'stored'
end

return { state, answer(), redis.call('HGETALL', KEYS[3]) }
