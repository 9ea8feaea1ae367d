-- arbiter, with several data servers, after the verdicts of a pass. lease token, number of this call (rising), buffer
-- size, threshold from now on, the teacher whose these are ('' : the one), then window minima for the buffer (at the home
-- alone) -> ok | lost
-- A call that is repeated adds no minimum twice: its number is the stored one.
local token, number, size, threshold, teacher = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
if not holds_lease('arbiter', token) then return {'lost'} end
even_when_full()
local minima = key(of_teacher(teacher, 'minima'))
redis.call('SET', key(of_teacher(teacher, 'threshold')), threshold)
local call, last = token .. ' ' .. number, key(of_teacher(teacher, 'calibrated'))
if redis.call('GET', last) == call then return {'ok'} end
redis.call('SET', last, call)
for i = 7, #ARGV do redis.call('RPUSH', minima, ARGV[i]) end
redis.call('LTRIM', minima, -size, -1)
return {'ok'}
