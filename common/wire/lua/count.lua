-- rollout worker. rid, nonce, tokens generated in all -> ok | lost
-- The owner's final count of a rollout that was stopped, overshoot included. Tokens that it wrote and could no longer
-- store count as generated too; repeating the call changes nothing.
local rid, nonce, generated = ARGV[2], ARGV[3], ARGV[4]
if redis.call('HGET', rollout(rid), 'owner') ~= nonce then return {'lost'} end
even_when_full()
local known = redis.call('HMGET', rollout(rid), 'counted', 'length')
if not known[1] then
  local beyond = tonumber(generated) - (count_in(known[2]) or tonumber(generated))
  redis.call('HSET', rollout(rid), 'counted', generated)
  if beyond > 0 then count_generated(beyond) end
end
redis.call('XADD', key('finished'), '*', 'kind', 'count', 'rid', rid, 'generated', generated)
return {'ok'}
