-- rollout worker. version of the weights that it could not take -> ok
-- For the learner, which may be waiting for rollouts that no worker can write without them.
even_when_full()
redis.call('HSET', key('policy'), 'refused', ARGV[2])
return {'ok'}
