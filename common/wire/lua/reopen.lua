-- feeder, operator. resolved config -> ok
-- A resumed run: keys that --resume may change reach the workers, which read the config here.
even_when_full()
redis.call('SET', key('config'), ARGV[2])
redis.call('SET', key('run'), 'open')
return {'ok'}
