-- feeder, on a Redis that lost the run. lease token, cursor, tokens generated in booked rollouts, how many rollouts are
-- alive, those, then ledger fields and counts -> ok | lost
-- The books on disk have the admitted rollouts and their endings; open rollouts have their own count of tokens.
local token, cursor, generated, alive = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
if not holds_lease('feeder', token) then return {'lost'} end
if tonumber(redis.call('GET', key('cursor')) or '0') >= tonumber(cursor) then return {'ok'} end
redis.call('DEL', key('ledger'))
for i = 6 + alive, #ARGV, 2 do redis.call('HSET', key('ledger'), ARGV[i], ARGV[i + 1]) end
for i = 6, 5 + alive do
  local state = redis.call('HMGET', rollout(ARGV[i]), 'length', 'counted')
  generated = generated + (count_in(state[2]) or count_in(state[1]) or 0)
end
redis.call('HSET', key('policy'), 'generated', generated)
redis.call('SET', key('cursor'), cursor)
return {'ok'}
