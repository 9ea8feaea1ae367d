-- feeder. lease token, then rollouts of groups whose members are all booked -> ok | lost
local token = ARGV[2]
if not holds_lease('feeder', token) then return {'lost'} end
for i = 3, #ARGV do redis.call('HDEL', key('rewards'), ARGV[i], 'group:' .. ARGV[i]) end
return {'ok'}
