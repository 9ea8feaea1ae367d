-- feeder, on a Redis that lost the run. lease token, cursor, then ledger fields and counts -> ok | lost
-- The books on disk say what was admitted and how it ended.
local token, cursor = ARGV[2], ARGV[3]
if not holds_lease('feeder', token) then return {'lost'} end
if tonumber(redis.call('GET', key('cursor')) or '0') >= tonumber(cursor) then return {'ok'} end
redis.call('DEL', key('ledger'))
for i = 4, #ARGV, 2 do redis.call('HSET', key('ledger'), ARGV[i], ARGV[i + 1]) end
redis.call('SET', key('cursor'), cursor)
return {'ok'}
