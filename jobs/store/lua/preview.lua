-- Replaces the preview of a running job and announces it. ARGV: id, now, token, picture.
-- Its number counts over all attempts, so that no two previews of a job have the same.
-- Returns 'ok', 'missing', 'superseded', 'deleted' if the job is to be deleted, or the state that
-- forbids the write.
local id, now, token = ARGV[1], ARGV[2], ARGV[3]
local record = record_of(id)
local known = redis.call('HMGET', record, 'state', 'token', 'delete_requested')
if not known[1] then return 'missing' end
if known[2] ~= token then return 'superseded' end
if known[1] ~= 'running' then return known[1] end
if known[3] then return 'deleted' end
redis.call('SET', '@PREVIEW@' .. id, ARGV[4], 'EX', @PREVIEW_TTL_S@)
redis.call('HSET', record, 'preview', redis.call('HINCRBY', record, 'previews', 1))
emit(id, 'preview', now)
return 'ok'
