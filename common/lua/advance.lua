-- learner: step -> the step that admission counts from. feeder: state -> the run's state.
-- lease role, lease token, 'step' | 'state', value -> ok | lost
local role, token, what, value = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if not holds_lease(role, token) then return {'lost'} end
even_when_full()
if what == 'step' then
  redis.call('HSET', key('policy'), 'step', value)
else
  redis.call('SET', key('run'), value)
end
return {'ok'}
