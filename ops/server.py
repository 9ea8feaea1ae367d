"""What a Redis server says of itself, and which servers no run can work on."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import redis

from common.config import Config
from common.footprint import ALLOWED_SHARE, least_bytes, maxmemory_mb, most_bytes

_OLDEST = (6, 2)  # XAUTOCLAIM
_MB = 1 << 20
# How servers refuse the database of a URL, and what it means.
_NO_DATABASE = {
    "cluster mode": "Redis in cluster mode has no database but 0, and Katana works on no cluster: name a single server",
    "DB index": "the server has no such database: look at its `databases`, the first is 0",
    "unknown command `SELECT`": "a Sentinel holds no data: name the server that it watches",
    "unknown command 'SELECT'": "a Sentinel holds no data: name the server that it watches",
}


def facts_of(client: redis.Redis) -> dict[str, Any]:
    """Its `INFO`; empty where the user may not ask. Raises what redis-py raises for one that does not answer."""
    with contextlib.suppress(redis.exceptions.NoPermissionError):
        return dict(client.info())
    return {}


def unusable(facts: dict[str, Any]) -> str | None:
    """Why no run can work on a server with these facts; None where nothing is known to stand in its way."""
    mode, version = facts.get("redis_mode"), str(facts.get("redis_version", ""))
    if mode == "cluster":
        return (
            "Redis in cluster mode spreads keys over servers, and has no second database for the broker: Katana needs "
            "a single server (cluster-enabled no)"
        )
    if mode == "sentinel":
        return "a Sentinel holds no data: name the server that it watches"
    if facts.get("role") == "slave":
        master = f"{facts.get('master_host', '?')}:{facts.get('master_port', '?')}"
        return f"a replica, whose writes are refused or lost: name its master, {master}"
    number = re.match(r"(\d+)\.(\d+)", version)
    if number and (int(number[1]), int(number[2])) < _OLDEST:
        return f"Redis {version} is too old: Katana needs 6.2 or newer"
    return None


def no_database(error: Exception) -> str | None:
    """What a refusal of the URL's database means; None for other errors."""
    if not isinstance(error, redis.exceptions.ResponseError):
        return None
    return next((meaning for words, meaning in _NO_DATABASE.items() if words in str(error)), None)


def too_small(config: Config, limit: int, where: str) -> str | None:
    """Why a run of this config may come to a stop with a `maxmemory` of so many bytes (0: none); None if it cannot."""
    if limit == 0 or least_bytes(config) <= ALLOWED_SHARE * limit:
        return None
    return (
        f"{where}: {limit / _MB:,.0f} MB, and a run of this config needs at least "
        f"{maxmemory_mb(least_bytes(config)):,} MB: 75 % of it must hold a batch of rollouts of full length. "
        f"{maxmemory_mb(most_bytes(config)):,} MB let it run without waiting; or lower learner.batch_size, "
        f"rollout.max_completion_length or termination.teacher_top_k"
    )


def memory_warning(config: Config, limit: int, where: str) -> str | None:
    """What a `maxmemory` of so many bytes (0: none) will do to a run of this config; None where nothing."""
    if limit == 0:
        return f"{where} is not set: when the machine is full the server is killed"
    if most_bytes(config) <= ALLOWED_SHARE * limit:
        return None
    return (
        f"{where}: up to {most_bytes(config) / _MB:,.0f} MB can be in flight, which is above 75 % of "
        f"{limit / _MB:,.0f} MB: the run will wait for memory, and write checkpoints to get it. Raise it to "
        f"{maxmemory_mb(most_bytes(config)):,} MB, or lower learner.batch_size, learner.max_staleness or "
        f"checkpoints.every_steps"
    )
