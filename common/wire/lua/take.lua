-- rollout worker. consumer, nonce, count, idle ms (0: claim nothing), where to claim from
-- -> ok, where to claim from next, then per rollout {rid, entry, chunks, length, claims}
-- An entry is idle if it has been idle for so long and its worker silent for so long: a live, busy one keeps what it
-- writes. A worker may claim an entry from itself: the reply that gave it was lost.
-- A value in a record that is not a number is returned as it is, or as nil: the worker gives the rollout up.
-- Idle entries come first: begun rollouts before new ones.
local consumer, nonce, count, idle, from = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local reply = {'ok', from}
if run_state ~= 'open' then return {'ended'} end

local function own(id, rid, claimed)
  local h = rollout(rid)
  local state = redis.call('HMGET', h, 'entry', 'verdict', 'chunks', 'length', 'owner', 'owners')
  -- Ended, or admitted by another entry than this one.
  if state[1] ~= id or state[2] then
    finish_entry('prompts', 'rollout', id)
    return
  end
  -- A rollout that was handed back has no owner: taking it is not counted as a takeover.
  local claims = 0
  if claimed and state[5] then
    claims = redis.pcall('HINCRBY', h, 'claims', 1)
    if type(claims) ~= 'number' then claims = false end
  end
  local owners = (state[6] or '') .. nonce .. ' ' .. (state[3] or '?') .. ' '
  redis.call('HSET', h, 'owner', nonce, 'worker', consumer, 'owners', owners)
  reply[#reply + 1] = {rid, id, state[3], state[4], claims}
end

local function each(entries, claimed)
  for _, entry in ipairs(entries) do
    -- 6.2 reports entries that were deleted while pending as nil, which Lua sees as false.
    if entry then
      local fields = entry[2]
      if fields and fields[1] == 'rid' then
        own(entry[1], fields[2], claimed)
      else
        reply[#reply + 1] = {false, entry[1], 0, 0, 0}
      end
    end
  end
end

local function claim(id, holder)
  if holder ~= consumer and not silent(holder, idle) then return end
  local entry = redis.call('XCLAIM', key('prompts'), 'rollout', consumer, idle, id)[1]
  if entry then
    each({entry}, true)
  else
    redis.call('XACK', key('prompts'), 'rollout', id)  -- deleted while pending
  end
end

if idle > 0 then
  -- A page at a time, from where the last call ended: starting from the beginning each time would never get past many
  -- live ones.
  local page = math.max(100, 10 * count)
  local pending = redis.call('XPENDING', key('prompts'), 'rollout', from, '+', page)
  reply[2] = '-'
  for _, one in ipairs(pending) do
    if #reply - 2 >= count then
      reply[2] = one[1]
      break
    end
    if one[3] >= idle then claim(one[1], one[2]) end
  end
  if reply[2] == '-' and #pending == page then reply[2] = '(' .. pending[page][1] end
end
local left = count - (#reply - 2)
if left > 0 then
  local fresh = redis.call('XREADGROUP', 'GROUP', 'rollout', consumer, 'COUNT', left,
                           'STREAMS', key('prompts'), '>')
  if fresh then each(fresh[1][2], false) end
end
return reply
