-- Put in front of every script. ARGV[1] is the run's key prefix; arguments of the script begin at ARGV[2].
-- A reply is an array whose first element is a word. 'gone': Redis no longer knows this run.
local function key(name) return ARGV[1] .. name end
local function rollout(rid) return ARGV[1] .. 'rollout:' .. rid end

local run_state = redis.call('GET', key('run'))
if not run_state then return {'gone'} end

-- Three quarters full: scripts that add work refuse, so that those that finish work always find room.
local function crowded()
  local info = redis.call('INFO', 'memory')
  local used = tonumber(info:match('used_memory:(%d+)'))
  local max = tonumber(info:match('maxmemory:(%d+)'))
  return max > 0 and used > 0.75 * max
end

local function holds_lease(role, token)
  return redis.call('GET', key('lease:' .. role)) == token
end

-- Acknowledge and remove an entry; 0 if somebody has done so before.
local function finish_entry(stream, group, id)
  local acked = redis.call('XACK', key(stream), group, id)
  redis.call('XDEL', key(stream), id)
  return acked
end
