"""`katana health ROLE CONFIG`: whether a role on this host works, and not only lives. For containers."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import redis
from prometheus_client.parser import text_string_to_metric_families

from common.config import Config, ConfigError
from common.streams import connect

_ANSWER_S = 3.0
_ON_THE_BROKER = ("feeder", "rollout", "teacher")


def health(role: str, config: Config, *, within_s: float) -> list[str]:
    """What is wrong with the role that serves its metrics here; an empty list for a healthy one.

    Well is a role whose metrics port answers, whose loop turned within `within_s` seconds, and that reaches Redis. A
    worker between two shifts turns no loop: then its port and both Redis servers tell. Raises ConfigError for a
    config that names no port or no Redis.
    """
    if config.metrics.port == 0:
        raise ConfigError("metrics.port: 0, a free port nobody knows; a health check needs a fixed one")
    if config.redis.url is None:
        raise ConfigError("redis.url: not set; a health check asks the Redis of the run")
    return [*_loop_trouble(role, config, within_s), *_redis_trouble(role, config)]


def _loop_trouble(role: str, config: Config, within_s: float) -> list[str]:
    host = "127.0.0.1" if config.metrics.host in ("0.0.0.0", "::", "") else config.metrics.host
    url = f"http://{host}:{config.metrics.port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        return [f"{url} does not answer: {error}"]
    turned = [
        sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "katana_loop_timestamp_seconds"
        for sample in family.samples
        if sample.labels.get("role") == role
    ]
    between_shifts = not turned or turned[0] == 0
    if between_shifts:
        return [] if role in ("rollout", "teacher") else [f"the loop of the {role} has not begun"]
    age = time.time() - turned[0]
    return [f"the loop of the {role} last turned {age:.0f} s ago"] if age > within_s else []


def _redis_trouble(role: str, config: Config) -> list[str]:
    found = []
    urls = {"redis.url": config.redis.url}
    if role in _ON_THE_BROKER:
        urls["redis.broker_url"] = config.redis.broker
    for name, url in urls.items():
        assert url is not None
        client = connect(url, **config.redis.access(role))
        try:
            client.ping()
        except (redis.exceptions.RedisError, OSError) as error:
            found.append(f"{name} {url!r} does not answer: {error}")
        finally:
            client.close()
    return found
