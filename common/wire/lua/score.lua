-- teacher worker. lane, entry, rid, seq, encoded divergence, encoded teacher log-probabilities, encoded view ('' : none)
-- -> ok | duplicate | ended
-- The first score stored wins; nobody reads the student's log-probabilities after it. The first score of a rollout fixes the threshold that it is judged by.
local lane, entry, rid, seq, divergence, support, view = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local h = rollout(rid)
finish_entry('chunks:' .. lane, 'teacher', entry)
local state = redis.call('HMGET', h, 'verdict', 't:' .. seq, 'd:' .. seq)
if run_state ~= 'open' or state[1] or not state[2] then return {'ended'} end
redis.call('HDEL', h, 'taken', 'begun:teacher')
if state[3] then return {'duplicate'} end
redis.call('HSETNX', h, 'threshold', redis.call('GET', key(of_teacher(lane:match('^(.+):') or '', 'threshold'))) or 'inactive')
redis.call('HSET', h, 'd:' .. seq, divergence, 'q:' .. seq, support)
if view ~= '' then redis.call('HSET', h, 'v:' .. seq, view) end
redis.pcall('HINCRBY', h, 'scored', 1)  -- if it is not a number, the writer finds out in its heartbeat
redis.call('HDEL', h, 'attempts', 's:' .. seq)
redis.call('XADD', key('scores'), '*', 'rid', rid)
return {'ok'}
