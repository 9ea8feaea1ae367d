-- learner. lease token, version, step, file, sha256 -> ok | old | lost
-- The policy version never goes back.
local token, version, step, file, sha256 = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
if not holds_lease('learner', token) then return {'lost'} end
local current = tonumber(redis.call('HGET', key('policy'), 'version') or '-1')
if version <= current then return {'old', current} end
even_when_full()
redis.call('HSET', key('policy'), 'version', version, 'step', step, 'file', file, 'sha256', sha256)
return {'ok'}
