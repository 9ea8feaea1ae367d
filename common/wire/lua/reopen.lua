-- feeder, operator. resolved config -> ok
-- A run that is gone on with: what --resume may change reaches the workers, who read the config here.
even_when_full()
redis.call('SET', key('config'), ARGV[2])
redis.call('SET', key('run'), 'open')
return {'ok'}
