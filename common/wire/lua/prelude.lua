-- Put in front of every script. ARGV[1] is the run's key prefix; arguments of the script begin at ARGV[2].
-- A reply is an array whose first element is a word. 'gone': Redis no longer knows this run.
local function key(name) return ARGV[1] .. name end
local function rollout(rid) return ARGV[1] .. 'rollout:' .. rid end

local run_state = redis.call('GET', key('run'))
if not run_state then return {'gone'} end

-- Whether Redis is fuller than a share of its maxmemory: scripts that add work refuse, so that those that finish work
-- always find room. Admission stops at three quarters; a tenth more is for what was admitted, which must be finished:
-- it has been reckoned to fit into the three quarters, and buffers, dead letters and other tenants were not.
local function crowded(share)
  local info = redis.call('INFO', 'memory')
  local used = tonumber(info:match('used_memory:(%d+)'))
  local max = tonumber(info:match('maxmemory:(%d+)'))
  return max > 0 and used > share * max
end

local function holds_lease(role, token)
  return redis.call('GET', key('lease:' .. role)) == token
end

-- A count in a hash that anybody may have broken; nil where it is none.
local function count_in(text)
  return text and #text <= 9 and text:match('^%d+$') and tonumber(text) or nil
end

-- Tokens written in the whole run, all of them, once each. What is no number there is counted anew.
local function count_generated(tokens)
  if type(redis.pcall('HINCRBY', key('policy'), 'generated', tokens)) ~= 'number' then
    redis.call('HSET', key('policy'), 'generated', tokens)
  end
end

-- Acknowledge and remove an entry; false if somebody has done so before. An entry that a lost group no longer calls
-- pending counts as long as it is in the stream.
local function finish_entry(stream, group, id)
  local acked = redis.call('XACK', key(stream), group, id)
  return redis.call('XDEL', key(stream), id) + acked > 0
end

-- A full Redis refuses a script whose first write adds something, and runs one to its end that began by taking off:
-- scripts that must go through, and have nothing to take off, begin with this.
local function even_when_full() redis.call('XDEL', key('dead'), '0-1') end

-- Redis's clock, in milliseconds.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + time[2] / 1000
end

-- Whether a worker has not said for so long that it lives. Nobody of that name ever said so: it is silent.
local function silent(worker, ms)
  local seen = redis.call('ZSCORE', key('workers'), worker)
  return not seen or now_ms() - tonumber(seen) * 1000 >= ms
end

-- Which roster of a role this is, as text. It moves on by the seconds of the clock, so that a Redis that lost it does not
-- come by a revision again that somebody knows.
local function roster_revision(role, changed)
  local name = key('changes:' .. role)
  local revision = changed and redis.call('INCRBY', name, redis.call('TIME')[1]) or redis.call('GET', name) or 0
  return string.format('%.0f', tonumber(revision))
end
