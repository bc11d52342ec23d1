-- Records that a job's video is no longer in the artifact store. ARGV: id.
local record = record_of(ARGV[1])
if redis.call('HGET', record, 'state') ~= 'succeeded' then return 0 end
return redis.call('HSETNX', record, 'video_deleted_at', stamp())
