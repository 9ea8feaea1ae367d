-- feeder. lease token, rid, ledger field ('' : only acknowledge), then the rollout's pending entries
-- -> ok + 1 if it was booked now, 0 if before | lost
local token, rid, field = ARGV[2], ARGV[3], ARGV[4]
if not holds_lease('feeder', token) then return {'lost'} end
for i = 5, #ARGV do finish_entry('finished', 'books', ARGV[i]) end
if field == '' then return {'ok', 0} end
local fresh = redis.call('SREM', key('open'), rid)
if fresh == 1 then redis.call('HINCRBY', key('ledger'), field, 1) end
-- A dead rollout's record stays for the operator.
if field ~= 'dead' then redis.call('DEL', rollout(rid)) end
return {'ok', fresh}
