-- rollout worker. rid, nonce, tokens generated in all -> ok | lost
-- The owner's final count of a rollout that was stopped, overshoot included.
local rid, nonce, generated = ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', rollout(rid), 'owner') ~= nonce then return {'lost'} end
even_when_full()
redis.call('XADD', key('finished'), '*', 'kind', 'count', 'rid', rid, 'generated', generated)
return {'ok'}
