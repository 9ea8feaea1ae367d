-- rollout worker, teacher worker. At its end: name, role (of several teachers teacher:NAME), then the streams that it
-- read as one of the role's group -> ok
-- The worker is removed from the live ones, and its name from every group in which it has no pending entries.
local name, role = ARGV[2], ARGV[3]
local group = role:match('^[^:]+')
even_when_full()
redis.call('ZREM', key('workers'), name)
if redis.call('ZREM', key('roster:' .. role), name) == 1 then roster_revision(role, true) end
for i = 4, #ARGV do
  local pending = redis.pcall('XPENDING', key(ARGV[i]), group, '-', '+', 1, name)
  if not pending.err and #pending == 0 then redis.call('XGROUP', 'DELCONSUMER', key(ARGV[i]), group, name) end
end
return {'ok'}
