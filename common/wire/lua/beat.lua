-- rollout worker. consumer, last signal that it has read, how many signals it is done with, those, then per rollout
-- rid, entry, nonce
-- -> ok, newer signals {{id, {field, value}}}, policy {field, value}, then per rollout its scored chunks, 'ended' (it
-- has a verdict) or 'lost' (another worker writes it, or it is gone)
-- Ownership is checked first: XCLAIM by a former owner would steal the entry back.
local consumer, last, done = ARGV[2], ARGV[3], tonumber(ARGV[4])
local signals = key('signals:' .. consumer)
for i = 5, 4 + done do redis.call('XDEL', signals, ARGV[i]) end
local came = redis.call('XREAD', 'COUNT', 256, 'STREAMS', signals, last)
local reply = {'ok', came and came[1][2] or {}, redis.call('HGETALL', key('policy'))}
for i = 5 + done, #ARGV, 3 do
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
