-- rollout worker, teacher worker, arbiter, learner. rid, role, begin | over -> ok + attempts without an end
-- Called before and after work on a rollout that may have killed the last process that worked on it.
local rid, role, what = ARGV[2], ARGV[3], ARGV[4]
local field = 'begun:' .. role
even_when_full()
if redis.call('EXISTS', rollout(rid)) == 0 then return {'ok', 0} end
if what == 'over' then
  redis.call('HDEL', rollout(rid), field)
  return {'ok', 0}
end
local begun = redis.pcall('HINCRBY', rollout(rid), field, 1)
if type(begun) ~= 'number' then  -- the count itself is broken: count from 0
  begun = 1
  redis.call('HSET', rollout(rid), field, begun)
end
return {'ok', begun}
