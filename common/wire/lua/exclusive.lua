-- rollout. what, token, ms, mode (take | drop) -> ok | held
-- A lock on a thing that the run's rollout workers share, a vLLM server or a number: one of them holds it at a time. Unlike a role's
-- lease it is taken again and again, and needs no more rights than these workers have.
local what, token, ms, mode = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local name = key('exclusive:' .. what)
local holder, till = unpack(redis.call('HMGET', name, 'token', 'until'))
local taken = holder and holder ~= token and (tonumber(till) or 0) > now_ms()
if taken then return {'held'} end
even_when_full()
if mode == 'drop' then
  redis.call('HDEL', name, 'token', 'until')
else
  redis.call('HSET', name, 'token', token, 'until', now_ms() + ms)
end
return {'ok'}
