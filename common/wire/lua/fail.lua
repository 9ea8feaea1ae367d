-- anyone who could not read a rollout or a notice. rid ('' : unknown), stage, reason, most attempts, shown bytes,
-- stream ('' : none), group, entry, a token of this report -> again + attempts | dead
-- Counts attempts without progress (a stored chunk or score clears the count) and gives a rollout up at the limit.
local rid, stage, reason, most, shown = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local stream, group, entry, report = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
even_when_full()
local known = rid ~= '' and redis.call('EXISTS', rollout(rid)) == 1
if known then
  -- A report that arrives twice counts once.
  local again = redis.call('HGET', rollout(rid), 'report') == report
  redis.call('HSET', rollout(rid), 'report', report)
  local attempts = redis.pcall('HINCRBY', rollout(rid), 'attempts', again and 0 or 1)
  if type(attempts) ~= 'number' then  -- the count itself is broken: count from 0
    attempts = 1
    redis.call('HSET', rollout(rid), 'attempts', attempts)
  end
  if attempts < most then return {'again', attempts} end
  if again then return {'dead'} end
end
if stream ~= '' and not finish_entry(stream, group, entry) and not known then return {'dead'} end
redis.call('XADD', key('dead'), '*', 'rid', rid, 'stage', stage, 'reason', reason, 'shown', shown)
if known and not redis.call('HGET', rollout(rid), 'verdict') then
  local prompt = redis.call('HGET', rollout(rid), 'entry')
  if prompt then finish_entry('prompts', 'rollout', prompt) end
  redis.call('HSET', rollout(rid), 'verdict', 'dead')
  redis.call('XADD', key('finished'), '*', 'kind', 'ending', 'rid', rid, 'ending', 'dead', 'reason', stage)
end
return {'dead'}
