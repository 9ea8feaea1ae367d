-- feeder, arbiter, learner. lease role, lease token, stream, group, most entries -> ok, then the adopted entries | lost
-- Each holder of a lease reads under its own consumer name, its token. The pending entries of former holders are taken
-- over here, also those read after the lease was lost (the holder was paused and continued).
local role, token, stream, group, most = ARGV[2], ARGV[3], key(ARGV[4]), ARGV[5], tonumber(ARGV[6])
if not holds_lease(role, token) then return {'lost'} end
if redis.call('EXISTS', stream) == 0 then return redis.error_reply('NOGROUP no such stream') end
even_when_full()
local reply = {'ok'}
for _, facts in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local name, pending = facts[2], facts[4]
  if name ~= token and pending == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, name)
  elseif name ~= token then
    for _, waiting in ipairs(redis.call('XPENDING', stream, group, '-', '+', most - #reply + 1, name)) do
      local claimed = redis.call('XCLAIM', stream, group, token, 0, waiting[1])
      if claimed[1] then
        reply[#reply + 1] = claimed[1]
      else
        redis.call('XACK', stream, group, waiting[1])  -- deleted while pending
      end
    end
    if #reply > most then return reply end
  end
end
return reply
