-- feeder. ms of silence, then streams and their groups {stream, group ...} -> ok, consumers taken off
-- Removes the names of killed workers: those that have been silent for so long and have no pending entries. Pending
-- entries keep a name until another worker has taken them over.
local ms, off = tonumber(ARGV[2]), 0
for i = 3, #ARGV, 2 do
  local stream, group = key(ARGV[i]), ARGV[i + 1]
  local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
  for _, facts in ipairs(consumers.err and {} or consumers) do
    if facts[4] == 0 and silent(facts[2], ms) then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, facts[2])
      off = off + 1
    end
  end
end
redis.call('ZREMRANGEBYSCORE', key('workers'), '-inf', now_ms() / 1000 - 3600)
return {'ok', off}
