-- feeder, when every rollout is booked. lease token, then stream and group of each -> ok | lost
-- Entries left in the streams belong to rollouts that have ended. The groups stay, for a run resumed with more steps.
local token = ARGV[2]
if not holds_lease('feeder', token) then return {'lost'} end
redis.call('DEL', key('rewards'))
even_when_full()
for i = 3, #ARGV, 2 do
  local stream, group = key(ARGV[i]), ARGV[i + 1]
  redis.call('XTRIM', stream, 'MAXLEN', 0)
  redis.call('XGROUP', 'DESTROY', stream, group)
  redis.call('XGROUP', 'CREATE', stream, group, 0, 'MKSTREAM')
end
return {'ok'}
