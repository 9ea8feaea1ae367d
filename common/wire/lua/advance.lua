-- learner: the step that it is at, the step that its checkpoint covers, whether one is at work; learner, feeder: the
-- run's state.
-- lease role, lease token, 'step' | 'covered' | 'learning' | 'state', value -> ok | lost
local role, token, what, value = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if not holds_lease(role, token) then return {'lost'} end
even_when_full()
if what ~= 'state' then
  redis.call('HSET', key('policy'), what, value)
else
  redis.call('SET', key('run'), value)
end
return {'ok'}
