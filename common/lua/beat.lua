-- rollout worker. consumer, then per rollout rid, entry, nonce -> ok, then per rollout its scored chunks,
-- 'ended' (it has a verdict) or 'lost' (somebody else writes it, or it is gone)
-- Ownership is checked first: XCLAIM by a former owner would steal the entry back.
local consumer = ARGV[2]
local reply = {'ok'}
for i = 3, #ARGV, 3 do
  local rid, entry, nonce = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local state = redis.call('HMGET', rollout(rid), 'owner', 'verdict', 'scored')
  local word
  if run_state ~= 'open' or state[2] then
    word = 'ended'
  elseif state[1] ~= nonce then
    word = 'lost'
  else
    redis.call('XCLAIM', key('prompts'), 'rollout', consumer, 0, entry, 'JUSTID')
    word = state[3]
  end
  reply[#reply + 1] = word
end
return reply
