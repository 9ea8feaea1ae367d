-- feeder. lease token, rid, encoded head, cursor after this rollout, threshold that it is judged by ('' or left out:
-- that of its first score); for one that is sent back, its entry in `again`, and its problem
-- -> ok | full | lost | ended | taken (that entry no longer exists) | behind (Redis lost what was admitted last)
-- Begins with writes that a full Redis refuses, as admission must be refused then: the request is removed last.
local token, rid, head, cursor, threshold = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local request, problem = ARGV[7], ARGV[8]
if not holds_lease('feeder', token) then return {'lost'} end
if run_state ~= 'open' then return {'ended'} end
-- Admitted before: a repeated or late call admits nothing, also when the rollout is booked and gone.
local admitted = tonumber(redis.call('GET', key('cursor')) or '0')
if admitted >= tonumber(cursor) then return {'ok'} end
if admitted < tonumber(cursor) - 1 then return {'behind'} end
if request and #redis.call('XRANGE', key('again'), request, request) == 0 then return {'taken'} end
if crowded(0.75) then return {'full'} end
redis.call('HSET', rollout(rid), 'head', head, 'chunks', 0, 'scored', 0, 'length', 0)
local entry = redis.call('XADD', key('prompts'), '*', 'rid', rid)
redis.call('HSET', rollout(rid), 'entry', entry)
if threshold and threshold ~= '' then redis.call('HSET', rollout(rid), 'threshold', threshold) end
redis.call('SADD', key('open'), rid)
redis.call('HINCRBY', key('ledger'), 'admitted', 1)
redis.call('SET', key('cursor'), cursor)
if request then
  redis.call('HSET', rollout(rid), 'problem', problem)
  redis.call('XDEL', key('again'), request)
end
return {'ok'}
