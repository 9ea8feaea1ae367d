-- operator. entry in `dead`, its rollout ('' : it names none), that one's problem ('' : remove both for good)
-- -> ok | absent (no such letter) | open (its rollout is not booked yet) | none (no dead rollout to send back) | ended
-- Letter and record are deleted in the script that adds the request to `again`: a second call finds neither.
local entry, rid, problem = ARGV[2], ARGV[3], ARGV[4]
if #redis.call('XRANGE', key('dead'), entry, entry) == 0 then return {'absent'} end
-- The feeder books a rollout from its record. A rollout that is booked and still has a record is dead.
if redis.call('SISMEMBER', key('open'), rid) == 1 then return {'open'} end
if problem ~= '' and run_state ~= 'open' then return {'ended'} end
if problem ~= '' and redis.call('EXISTS', rollout(rid)) == 0 then return {'none'} end
redis.call('XDEL', key('dead'), entry)
redis.call('DEL', rollout(rid))
if problem ~= '' then redis.call('XADD', key('again'), '*', 'rid', rid, 'problem', problem) end
return {'ok'}
