"""The Redis part of `katana check`: the data servers and Celery's broker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis

from common.config import Config, ConfigError
from common.footprint import most_bytes
from ops.reach.server import (
    Unreachable,
    answering,
    broker_name,
    data_servers,
    facts_of,
    memory_of,
    memory_warning,
    too_small,
)
from ops.run.findings import Findings

_MB = 1 << 20


def check_redis(config: Config, found: Findings) -> None:
    """Check all servers. One that does not answer is reported as unchecked."""
    settings = config.redis
    several = f", on {len(settings.data)} data servers" if settings.data else ""
    found.lines.append(f"redis      at most {most_bytes(config) / _MB:,.0f} MB in flight{several}")
    if settings.url is None:
        _check_memory(config, settings.maxmemory_mb * _MB, "redis.maxmemory_mb", found)
        return
    # Each is checked by itself: one server that does not answer must not hide a problem of the other.
    servers = [
        (url, _ask(found, partial(answering, name, url, config, "operator"))) for name, url in data_servers(config)
    ]
    broker = _ask(found, lambda: answering(broker_name(config), settings.broker, config, "operator"))
    for url, data in servers:
        if data is not None:
            _check_data(config, url, facts_of(data), found)
    _check_apart(servers, found)
    if broker is not None:
        _check_broker(config, facts_of(broker), found)
    for name, (_, data) in zip(data_servers(config), servers, strict=True):
        if data is not None and broker is not None and _database(data) == _database(broker):
            _warn(
                found,
                f"redis.broker_url: {settings.broker} is the same database as {name[0]}: flushing one flushes both; "
                f"give Celery a separate database",
            )


def _check_apart(servers: Sequence[tuple[str, redis.Redis | None]], found: Findings) -> None:
    """Two names of the same database are a problem: each server has a part of the run under the same keys."""
    known: dict[tuple[Any, int], str] = {}
    for url, client in servers:
        if client is not None and len(servers) > 1:
            other = known.setdefault(_database(client), url)
            if other != url:
                found.problems.append(f"redis.data: {other} and {url} are the same database of one server")


def _ask(found: Findings, connect: Callable[[], redis.Redis]) -> redis.Redis | None:
    """A client of a server, or None: then a problem is recorded, or `unchecked` if the server does not answer."""
    try:
        return connect()
    except Unreachable as error:
        found.unchecked.append(str(error))
        return None
    except ConfigError as error:
        found.problems.append(str(error))
        return None


def _check_data(config: Config, url: str, facts: dict[str, Any], found: Findings) -> None:
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.problems.append(
            f"{url}: maxmemory-policy is {policy}, so a full Redis would evict data of the run; allowed: noeviction"
        )
    if "maxmemory" in facts:
        _check_memory(config, int(facts["maxmemory"]) * len(config.redis.servers), memory_of(config, url), found)
    if facts.get("aof_enabled") == 0:
        _warn(
            found,
            f"{url} writes no append-only file (appendonly no): when it stops, all work in flight is lost, and the run "
            f"continues from its checkpoint",
        )


def _check_memory(config: Config, limit: int, where: str, found: Findings) -> None:
    if problem := too_small(config, limit, where):
        found.problems.append(problem)
    elif warning := memory_warning(config, limit, where):
        _warn(found, warning)


def _check_broker(config: Config, facts: dict[str, Any], found: Findings) -> None:
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        _warn(
            found,
            f"the broker {config.redis.broker} evicts (maxmemory-policy is {policy}; wanted: noeviction): when full, "
            f"it drops worker tasks, and workers are idle until the next one is sent",
        )


def _warn(found: Findings, text: str) -> None:
    found.lines.append(f"warning    {text}")


def _database(client: redis.Redis) -> tuple[Any, int]:
    """Server and number of a client's database."""
    return facts_of(client).get("run_id", object()), int(client.connection_pool.connection_kwargs.get("db") or 0)
