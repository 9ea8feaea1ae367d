-- rollout worker, teacher worker, arbiter, learner. rid, role, begin | over -> ok + attempts that nobody came back from
-- Said before and after work on a rollout that may have ended the process of whoever worked on it last.
local rid, role, what = ARGV[2], ARGV[3], ARGV[4]
local field = 'begun:' .. role
even_when_full()
if redis.call('EXISTS', rollout(rid)) == 0 then return {'ok', 0} end
if what == 'over' then
  redis.call('HDEL', rollout(rid), field)
  return {'ok', 0}
end
local begun = redis.pcall('HINCRBY', rollout(rid), field, 1)
if type(begun) ~= 'number' then  -- broken itself: counted anew
  begun = 1
  redis.call('HSET', rollout(rid), field, begun)
end
return {'ok', begun}
