"""A client of a Redis that answers, and that a run can work on; and facts about a server."""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from typing import Any

import redis

from common.config import Config, ConfigError
from common.footprint import ALLOWED_SHARE, least_bytes, maxmemory_mb, most_bytes
from common.wire.connect import connect

_OLDEST = (6, 2)  # XAUTOCLAIM
_MB = 1 << 20
# How servers refuse the database of a URL, and what it means.
_NO_DATABASE = {
    "cluster mode": "Redis in cluster mode has no database but 0, and Katana works on no cluster: name a single server",
    "DB index": "the server has no such database: look at its `databases`, the first is 0",
    "unknown command `SELECT`": "a Sentinel holds no data: name the server that it watches",
    "unknown command 'SELECT'": "a Sentinel holds no data: name the server that it watches",
}
_ON_BROKER = ("feeder", "rollout", "teacher")  # roles that need Celery's broker too
_OTHERWISE = {
    "redis": "; or is it one with TLS, rediss://?",
    "rediss": "; or is it one without TLS, redis://?",
    "unix": "",
}


class Unreachable(ConfigError):
    """A Redis that does not answer: it may be there a moment later."""


def reach(config: Config, role: str = "operator") -> list[redis.Redis]:
    """A client of each of the config's data servers, as a role. Raises ConfigError when there is none or no run can
    work on one, also on the broker where the role needs that; Unreachable, which is one too, when one does not
    answer."""
    if config.redis.url is None:
        raise ConfigError("redis.url: not set; a single role needs the Redis of its run (katana run brings its own)")
    clients = [answering(name, url, config, role) for name, url in data_servers(config)]
    if role in _ON_BROKER:
        with contextlib.suppress(Unreachable):  # the caller retries, and logs it
            answering(broker_name(config), config.redis.broker, config, role, wait_s=0.0).close()
    return clients


def data_servers(config: Config) -> list[tuple[str, str]]:
    """The data servers: what each is called in messages, and its URL."""
    urls = config.redis.servers
    names = ["redis.url"] if len(urls) == 1 else [f"redis.data[{place}]" for place in range(len(urls))]
    return list(zip(names, urls, strict=True))


def answering(name: str, url: str, config: Config, role: str, wait_s: float = 10.0) -> redis.Redis:
    """A client of a server that answers and that a run can work on. Raises ConfigError, Unreachable; `name` stands in
    their messages."""
    client = connect(url, **config.redis.access(role))
    deadline = time.monotonic() + min(wait_s, config.liveness.redis_wait_s)
    while True:
        try:
            client.ping()
            wrong = unusable(facts_of(client))
            break
        except (redis.exceptions.RedisError, OSError) as error:
            if refused := _refusal(error, role):
                raise ConfigError(f"{name} {url!r}: {refused}") from error
            if time.monotonic() >= deadline:
                otherwise = _OTHERWISE[url.partition(":")[0]]
                raise Unreachable(f"{name} {url!r}: Redis does not answer ({error}){otherwise}") from error
            time.sleep(0.2)
    if wrong:
        raise ConfigError(f"{name} {url!r}: {wrong}")
    return client


def broker_name(config: Config) -> str:
    """What the broker's URL is called in messages."""
    return "redis.broker_url" if config.redis.broker_url else "redis.broker_url (not set: database 1 of redis.url)"


def _refusal(error: Exception, role: str) -> str | None:
    """Meaning of an error that waiting does not fix; None for others. Never contains user or password."""
    if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
        return f"Redis refuses the {role}: check redis.username, redis.password_file and its ACL"
    if isinstance(error.__cause__ or error.__context__, ssl.SSLError):
        return f"no TLS connection ({error}): check redis.ca_file, cert_file, key_file, and the host in the URL"
    return _no_database(error)


def facts_of(client: redis.Redis) -> dict[str, Any]:
    """Its `INFO`; empty if the user may not call it. Raises redis-py's errors for one that does not answer."""
    with contextlib.suppress(redis.exceptions.NoPermissionError):
        return dict(client.info())
    return {}


def unusable(facts: dict[str, Any]) -> str | None:
    """Why no run can work on a server with these facts; None if nothing is known against it."""
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


def _no_database(error: Exception) -> str | None:
    """What a refusal of the URL's database means; None for other errors."""
    if not isinstance(error, redis.exceptions.ResponseError):
        return None
    return next((meaning for words, meaning in _NO_DATABASE.items() if words in str(error)), None)


def memory_of(config: Config, url: str) -> str:
    """What the memory for a run is called, where a server has its share: that of the server times their number."""
    servers = len(config.redis.servers)
    return f"maxmemory of {url}" + (f" times {servers} servers" if servers > 1 else "")


def too_small(config: Config, limit: int, where: str) -> str | None:
    """Why a run of this config may stand still with a `maxmemory` of so many bytes (0: none); None if it cannot."""
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
