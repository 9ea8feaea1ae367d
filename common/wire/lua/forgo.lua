-- learner. lease token, first rollout of a group, why it is trained without reward -> ok, the reason that is stored | lost
-- Before the step: a learner that takes over, and the group's members that come later, find it.
local token, first, reason = ARGV[2], 'group:' .. ARGV[3], ARGV[4]
if not holds_lease('learner', token) then return {'lost'} end
even_when_full()
redis.call('HSETNX', key('rewards'), first, reason)
return {'ok', redis.call('HGET', key('rewards'), first)}
