-- feeder. lease token, rid, its standing in its group -> ok, the one that is stored | lost
-- The first one stays: a verifier that says something else in another process changes nothing.
local token, rid, standing = ARGV[2], ARGV[3], ARGV[4]
if not holds_lease('feeder', token) then return {'lost'} end
even_when_full()
redis.call('HSETNX', key('rewards'), rid, standing)
return {'ok', redis.call('HGET', key('rewards'), rid)}
