-- teacher worker. stream, consumer, idle ms, most entries
-- -> ok, then per entry {id, {field, value}, takeovers of its rollout without progress} | lost (the group is)
-- Takes over notices that have been idle for so long and whose consumer has been silent for so long: a live, busy one
-- keeps what it holds. A takeover counts against the rollout, once for all of its notices, until a score is stored;
-- a takeover from the same consumer (it never received the notice) does not count.
local stream, consumer, idle, most = key(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local reply, counted, from = {'ok'}, {}, '-'

local function take(id, owner)
  local entry = redis.call('XCLAIM', stream, 'teacher', consumer, idle, id)[1]
  if not entry then
    redis.call('XACK', stream, 'teacher', id)  -- deleted while pending
    return
  end
  local rid = entry[2][1] == 'rid' and entry[2][2] or ''
  if not counted[rid] and owner ~= consumer and redis.call('EXISTS', rollout(rid)) == 1 then
    counted[rid] = redis.pcall('HINCRBY', rollout(rid), 'taken', 1)
    if type(counted[rid]) ~= 'number' then  -- the count itself is broken: count from 0
      counted[rid] = 1
      redis.call('HSET', rollout(rid), 'taken', 1)
    end
  end
  reply[#reply + 1] = {entry[1], entry[2], counted[rid] or 0}
end

even_when_full()
while #reply <= most do
  local pending = redis.pcall('XPENDING', stream, 'teacher', 'IDLE', idle, from, '+', 100)
  if pending.err then return pending.err:find('NOGROUP') and {'lost'} or pending end
  for _, one in ipairs(pending) do
    if #reply <= most and (one[2] == consumer or silent(one[2], idle)) then take(one[1], one[2]) end
  end
  if #pending < 100 then break end
  from = '(' .. pending[100][1]
end
return reply
