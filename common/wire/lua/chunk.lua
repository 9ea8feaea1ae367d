-- rollout worker. rid, nonce, seq, encoded tokens, encoded support, encoded log-probabilities, lane, tokens in all, finish ('' while open)
-- -> ok + scored chunks | ended | lost | full
-- A chunk and its notice are one script. The same chunk again (same encoded tokens, which hold the digest of the
-- support and the log-probabilities) is a success. Its tokens, after those stored before, count as generated.
local rid, nonce, seq = ARGV[2], ARGV[3], tonumber(ARGV[4])
local tokens, support, logprobs, lane, length, finish = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local h = rollout(rid)
local state = redis.call('HMGET', h, 'verdict', 'owner', 'chunks', 'scored', 'entry', 'length')
if run_state ~= 'open' or state[1] then return {'ended'} end
if state[2] ~= nonce then return {'lost'} end
-- The stored record is broken: the next worker that takes the rollout gets it as it is and gives the rollout up.
if not state[3] or not state[3]:find('^%d+$') then return {'lost'} end
local stored = tonumber(state[3])
if seq < stored then
  if redis.call('HGET', h, 't:' .. seq) == tokens then return {'ok', state[4]} end
  return {'lost'}
end
if seq > stored then return {'lost'} end
if crowded(0.85) then return {'full'} end
if finish ~= '' then finish_entry('prompts', 'rollout', state[5]) end
redis.call('HSET', h, 't:' .. seq, tokens, 'p:' .. seq, support, 's:' .. seq, logprobs, 'chunks', seq + 1, 'length', length)
redis.call('HDEL', h, 'attempts', 'claims', 'begun:rollout')
if finish ~= '' then redis.call('HSET', h, 'finish', finish) end
local before = count_in(state[6])
if before and before < tonumber(length) then count_generated(tonumber(length) - before) end
redis.call('XADD', key('chunks:' .. lane), '*', 'rid', rid, 'seq', seq)
return {'ok', state[4]}
