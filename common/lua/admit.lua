-- feeder. lease token, rid, encoded head, cursor behind this rollout -> ok | full | lost | ended
-- Begins with writes that a full Redis refuses, which is what admission must do then.
local token, rid, head, cursor = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if not holds_lease('feeder', token) then return {'lost'} end
if run_state ~= 'open' then return {'ended'} end
if redis.call('EXISTS', rollout(rid)) == 1 then return {'ok'} end
if crowded() then return {'full'} end
redis.call('HSET', rollout(rid), 'head', head, 'chunks', 0, 'scored', 0, 'length', 0)
local entry = redis.call('XADD', key('prompts'), '*', 'rid', rid)
redis.call('HSET', rollout(rid), 'entry', entry)
redis.call('SADD', key('open'), rid)
redis.call('HINCRBY', key('ledger'), 'admitted', 1)
redis.call('SET', key('cursor'), cursor)
return {'ok'}
