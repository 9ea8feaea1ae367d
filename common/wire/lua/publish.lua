-- learner. lease token, version, step, file, sha256 -> ok | old | lost
-- The policy version never goes back.
local token, version, step, file, sha256 = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
if not holds_lease('learner', token) then return {'lost'} end
local held = redis.call('HGET', key('policy'), 'version') or ''
local current = #held <= 15 and tonumber(held:match('^%d+$')) or -1  -- a value that is not a number is replaced
if version <= current then return {'old', current} end
even_when_full()
redis.call('HSET', key('policy'), 'version', version, 'step', step, 'file', file, 'sha256', sha256)
return {'ok'}
