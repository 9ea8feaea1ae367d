"""`katana health ROLE CONFIG`: the health check of a role on this host, for containers."""

from __future__ import annotations

import time

import redis

from common.config import Config, ConfigError
from common.wire.connect import connect
from ops.reach.ports import Target, scrape
from ops.reach.server import data_servers

_ANSWER_S = 3.0
_ON_THE_BROKER = ("feeder", "rollout", "teacher")


def health(role: str, config: Config, *, within_s: float) -> list[str]:
    """What is wrong with the role that serves its metrics here; an empty list if it is healthy.

    A role is healthy if its metrics port answers, its loop began an iteration within the last `within_s` seconds, and
    it reaches Redis. A worker between two worker tasks has no loop: only its port and both Redis servers are checked.
    Raises ConfigError for a config that names no port or no Redis.
    """
    if config.metrics.port == 0:
        raise ConfigError("metrics.port: 0 means any free port; a health check needs a fixed one")
    if config.redis.url is None:
        raise ConfigError("redis.url: not set; a health check asks the Redis of the run")
    return [*_loop_trouble(role, config, within_s), *_redis_trouble(role, config)]


def _loop_trouble(role: str, config: Config, within_s: float) -> list[str]:
    host = "127.0.0.1" if config.metrics.host in ("0.0.0.0", "::", "") else config.metrics.host
    (served,) = scrape([Target(role, role, f"{host}:{config.metrics.port}")], timeout_s=_ANSWER_S)
    if served.trouble:
        return [f"{served.target.address}: {served.trouble}"]
    iterated_at = served.value("katana_loop_timestamp_seconds", role=role)
    if not iterated_at:
        return [] if role in ("rollout", "teacher") else [f"the loop of the {role} has not started"]
    age = time.time() - iterated_at
    return [f"the last iteration of the {role}'s loop was {age:.0f} s ago"] if age > within_s else []


def _redis_trouble(role: str, config: Config) -> list[str]:
    found = []
    urls = dict(data_servers(config))
    if role in _ON_THE_BROKER:
        urls["redis.broker_url"] = config.redis.broker
    for name, url in urls.items():
        client = connect(url, **config.redis.access(role))
        try:
            client.ping()
        except (redis.exceptions.RedisError, OSError) as error:
            found.append(f"{name} {url!r} does not answer: {error}")
        finally:
            client.close()
    return found
