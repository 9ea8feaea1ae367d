-- arbiter, with several data servers, after the verdicts of a pass. lease token, number of this call (rising), buffer
-- size, threshold from now on, then window minima for the buffer (at the home alone) -> ok | lost
-- A call that is repeated adds no minimum twice: its number is the stored one.
local token, number, size, threshold = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
if not holds_lease('arbiter', token) then return {'lost'} end
even_when_full()
redis.call('SET', key('threshold'), threshold)
local call = token .. ' ' .. number
if redis.call('GET', key('calibrated')) == call then return {'ok'} end
redis.call('SET', key('calibrated'), call)
for i = 6, #ARGV do redis.call('RPUSH', key('minima'), ARGV[i]) end
redis.call('LTRIM', key('minima'), -size, -1)
return {'ok'}
