-- rollout worker, teacher worker. name, role (of several teachers teacher:NAME), ms after which a silent worker is off the roster of the role (0: it has
-- none), revision of the roster that is known, then facts {field, value ...}
-- -> ok, revision, and the roster's names if it is another one
-- The live workers are returned only when the roster has changed: every heartbeat of every worker calls this.
local name, role, silence, known = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
even_when_full()
local now = now_ms() / 1000
redis.call('ZADD', key('workers'), now, name)
redis.call('HSET', key('worker:' .. name), unpack(ARGV, 6))
redis.call('EXPIRE', key('worker:' .. name), 3600)
if silence == 0 then return {'ok', '0'} end
local came = redis.call('ZADD', key('roster:' .. role), now, name)
local went = redis.call('ZREMRANGEBYSCORE', key('roster:' .. role), '-inf', '(' .. now - silence / 1000)
local revision = roster_revision(role, came + went > 0)
if revision == known then return {'ok', revision} end
return {'ok', revision, unpack(redis.call('ZRANGE', key('roster:' .. role), 0, 7999))}
