-- rollout worker. consumer, then per rollout rid, entry, nonce -> ok
-- Hands rollouts back: no owner, and the entry is pending for a consumer `nobody`, which never sends heartbeats, with
-- so long an idle time that the next worker takes it at once.
for i = 3, #ARGV, 3 do
  local rid, entry, nonce = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if redis.call('HGET', rollout(rid), 'owner') == nonce then
    redis.call('HDEL', rollout(rid), 'owner', 'begun:rollout')
    redis.call('XCLAIM', key('prompts'), 'rollout', 'nobody', 0, entry, 'IDLE', 86400000, 'JUSTID')
  end
end
return {'ok'}
