-- Put in front of every script. ARGV[1] is the run's key prefix; arguments of the script begin at ARGV[2].
-- A reply is an array whose first element is a status word. 'gone': Redis no longer has this run.
local function key(name) return ARGV[1] .. name end
local function rollout(rid) return ARGV[1] .. 'rollout:' .. rid end

local run_state = redis.call('GET', key('run'))
if not run_state then return {'gone'} end

-- Whether Redis uses more than a share of its maxmemory: scripts that add work refuse, so that those that finish work
-- always find room. Admission stops at three quarters. Another tenth is for admitted rollouts, which must be finished:
-- they were calculated to fit into the three quarters, but buffers, dead letters and other tenants were not.
local function crowded(share)
  local info = redis.call('INFO', 'memory')
  local used = tonumber(info:match('used_memory:(%d+)'))
  local max = tonumber(info:match('maxmemory:(%d+)'))
  return max > 0 and used > share * max
end

local function holds_lease(role, token)
  return redis.call('GET', key('lease:' .. role)) == token
end

-- A count in a hash that may be broken; nil if it is not a number.
local function count_in(text)
  return text and #text <= 9 and text:match('^%d+$') and tonumber(text) or nil
end

-- Tokens written in the whole run, each counted once. A value that is not a number is counted from 0.
local function count_generated(tokens)
  if type(redis.pcall('HINCRBY', key('policy'), 'generated', tokens)) ~= 'number' then
    redis.call('HSET', key('policy'), 'generated', tokens)
  end
end

-- The name of a thing that each of several teachers has; '' is the one teacher.
local function of_teacher(teacher, name) return teacher == '' and name or name .. ':' .. teacher end

-- Acknowledge and remove an entry; false if that was done before. An entry that is not pending because its group was
-- lost counts as long as it is in the stream.
local function finish_entry(stream, group, id)
  local acked = redis.call('XACK', key(stream), group, id)
  return redis.call('XDEL', key(stream), id) + acked > 0
end

-- A full Redis refuses a script whose first write adds something, and runs one to its end whose first write deletes:
-- scripts that must succeed, and have nothing to delete, begin with this.
local function even_when_full() redis.call('XDEL', key('dead'), '0-1') end

-- Redis's clock, in milliseconds.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

-- Whether a worker has sent no heartbeat for so long. A name that never sent one is silent.
local function silent(worker, ms)
  local seen = redis.call('ZSCORE', key('workers'), worker)
  return not seen or now_ms() - tonumber(seen) * 1000 >= ms
end

-- The revision of a role's roster, as text. It grows by the clock's seconds each time, so that a Redis that lost it does
-- not repeat a revision that a worker knows.
local function roster_revision(role, changed)
  local name = key('changes:' .. role)
  local revision = changed and redis.call('INCRBY', name, redis.call('TIME')[1]) or redis.call('GET', name) or 0
  return string.format('%.0f', tonumber(revision))
end
