-- rollout worker. consumer, nonce, count, idle ms (0: claim nothing), where to claim from
-- -> ok, where to claim from next, then per rollout {rid, entry, chunks, length, claims}
-- What is no number in a record is handed out as it is, or as nil: its taker gives the rollout up.
-- Idle entries first: what somebody began comes before what nobody has.
local consumer, nonce, count, idle, from = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local reply = {'ok', from}
if run_state ~= 'open' then return {'ended'} end

local function own(id, rid, claimed)
  local h = rollout(rid)
  local state = redis.call('HMGET', h, 'entry', 'verdict', 'chunks', 'length', 'owner', 'owners')
  -- Over, or admitted by another entry than this one.
  if state[1] ~= id or state[2] then
    finish_entry('prompts', 'rollout', id)
    return
  end
  -- A rollout that was handed back has no owner: taking it up is no sign of trouble.
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

if idle > 0 then
  -- It looks at ten times COUNT entries: from the beginning each time it would never get past many live ones.
  local claimed = redis.call('XAUTOCLAIM', key('prompts'), 'rollout', consumer, idle, from, 'COUNT', count)
  reply[2] = claimed[1]
  each(claimed[2], true)
end
local left = count - (#reply - 2)
if left > 0 then
  local fresh = redis.call('XREADGROUP', 'GROUP', 'rollout', consumer, 'COUNT', left,
                           'STREAMS', key('prompts'), '>')
  if fresh then each(fresh[1][2], false) end
end
return reply
