-- learner. lease token, then per trajectory entry, rid, ending, reason, detail -> ok + how many were new | lost
-- Called for rollouts that a checkpoint on disk covers, and for dropped ones. The feeder deletes the hash when it books.
local token = ARGV[2]
if not holds_lease('learner', token) then return {'lost'} end
local fresh = 0
for i = 3, #ARGV, 5 do
  local entry, rid, ending, reason, detail = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  if finish_entry('trajectories', 'learner', entry) then
    fresh = fresh + 1
    -- A second notice of the same rollout finds this, and trains nothing.
    if redis.call('EXISTS', rollout(rid)) == 1 then redis.call('HSET', rollout(rid), 'settled', ending) end
    redis.call('XADD', key('finished'), '*', 'kind', 'ending', 'rid', rid, 'ending', ending, 'reason', reason,
               'staleness', detail)
  end
end
return {'ok', fresh}
