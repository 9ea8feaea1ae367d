-- arbiter. lease token, rid, encoded verdict ('' when there is none to give: only acknowledge), tokens to train,
-- stop (1: signal the writer), window minimum for the buffer ('' : none), buffer size, threshold from now on ('' : as it
-- is), the teacher whose these are ('' : the one), then the rollout's pending score entries -> ok | duplicate | absent (the rollout was booked and taken off) | lost
-- A rollout has exactly one verdict; the entries that waited for it are removed with it.
local token, rid, verdict, train = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local stop, minimum, size, threshold, teacher = ARGV[6], ARGV[7], tonumber(ARGV[8]), ARGV[9], ARGV[10]
if not holds_lease('arbiter', token) then return {'lost'} end
for i = 11, #ARGV do finish_entry('scores', 'arbiter', ARGV[i]) end
local h = rollout(rid)
local state = redis.call('HMGET', h, 'head', 'verdict', 'entry', 'worker')
if not state[1] then return {'absent'} end
if state[2] or verdict == '' then return {'duplicate'} end
finish_entry('prompts', 'rollout', state[3])
redis.call('HSET', h, 'verdict', verdict)
redis.call('XADD', key('finished'), '*', 'kind', 'verdict', 'rid', rid, 'body', verdict)
if train > 0 then
  redis.call('XADD', key('trajectories'), '*', 'rid', rid)
else
  redis.call('XADD', key('finished'), '*', 'kind', 'ending', 'rid', rid, 'ending', 'dropped', 'reason', 'empty')
end
if stop == '1' and state[4] then
  local signals = key('signals:' .. state[4])
  redis.call('XADD', signals, '*', 'rid', rid)
  redis.call('EXPIRE', signals, 60)
end
if minimum ~= '' then
  local minima = key(of_teacher(teacher, 'minima'))
  redis.call('RPUSH', minima, minimum)
  redis.call('LTRIM', minima, -size, -1)
end
if threshold ~= '' then redis.call('SET', key(of_teacher(teacher, 'threshold')), threshold) end
return {'ok'}
