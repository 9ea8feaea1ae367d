"""A Redis that holds no more than a run needs at least."""

from __future__ import annotations

from real_runs import DEMO

from common.config import load
from common.footprint import least_bytes, maxmemory_mb
from common.wire.connect import connect
from ops.reach.embedded import EmbeddedRedis

SHORT = "no batch comes and Redis is short of memory: checkpoint at step"  # the learner's log, where it makes room


def leave_least(server: EmbeddedRedis, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Leave a server the least that a run with these settings needs; returns the settings with the server in them."""
    config = load(DEMO, list(settings))
    with connect(server.url) as client:
        client.config_set("maxmemory", maxmemory_mb(least_bytes(config)) << 20)
    return (*settings, f"redis.url={server.url}", f"redis.broker_url={server.broker_url}")
