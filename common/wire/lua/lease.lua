-- feeder, arbiter, learner. role, token, ms, mode (take | renew | drop) -> ok | held
-- An expired lease that no other process has taken is renewed: its holder was only slow.
local role, token, ms, mode = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local name = key('lease:' .. role)
local holder = redis.call('GET', name)
if holder and holder ~= token then return {'held'} end
even_when_full()
if mode == 'drop' then
  redis.call('DEL', name)
elseif mode == 'renew' and not holder and redis.call('GET', key('holder:' .. role)) ~= token then
  return {'held'}
else
  redis.call('SET', name, token, 'PX', ms)
  redis.call('SET', key('holder:' .. role), token)
end
return {'ok'}
