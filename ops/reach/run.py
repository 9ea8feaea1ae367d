"""The one way to a run from outside: from a config, or the one in a run's folder, to the run's Redis, its id, its plane
and the config that it uses.

There are three entries. Live views (`Outlook`: `katana top`, `katana watch`) look again and again, start nothing, and
cope with a run that is away. Commands that act on a run (`opened`: `katana dead`) start its embedded Redis meanwhile,
if no `katana run` is running. A role (`wait_for_key`, `wait_for_config`) waits until the run exists.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import redis

from common.config import Config, ConfigError, parse
from common.runfiles.making import lock
from common.runfiles.names import REDIS, RUN
from common.runfiles.run import RunFolder
from common.wire.connect import connect
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping, current_run
from common.wire.planes import check_places, open_planes
from ops.reach.embedded import EmbeddedRedis, socket_in, url_in
from ops.reach.left_over import left_by_harness
from ops.reach.server import reach

log = logging.getLogger("katana.reach")
_HERE = ("name", "runs_dir")  # the folder and name of the run come from the given config


class Away(Exception):
    """Redis, or the run in it, cannot be seen now; it may come back."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run in its Redis, and the config that it uses."""

    config: Config
    plane: Plane

    @property
    def run_key(self) -> str:
        return self.plane.run_key

    @property
    def client(self) -> Any:
        return self.plane.client

    def key(self, name: str) -> str:
        return self.plane.key(name)


# --- the steps ------------------------------------------------------------------------------------------------------


def find_key(config: Config, source: Path, client: redis.Redis) -> str | None:
    """The id of the run whose folder the config's file lies in; for another file, of the run that has the config's name
    now, None where there is none. Raises ConfigError for a folder without one."""
    if source.resolve().parent == config.run_dir.resolve():
        return RunFolder(config.run_dir).run_key
    return current_run(client, config.name)


def working_config(raw: bytes, run_key: str, given: Config, own: Sequence[str] = _HERE) -> Config:
    """The config of a run, from Redis. The connection to Redis, and the keys `own`, come from the given config. Raises
    ConfigError."""
    shared = parse(raw, source=f"config of {run_key}")
    access = given.redis.model_copy(update={"shards": shared.redis.shards})
    return shared.model_copy(update={"redis": access} | {name: getattr(given, name) for name in own})


def with_redis(config: Config, url: str, broker_url: str | None) -> Config:
    """The config with other addresses."""
    redis_there = config.redis.model_copy(update={"url": url, "broker_url": broker_url})
    return config.model_copy(update={"redis": redis_there})


# --- looking ----------------------------------------------------------------------------------------------------------


class Outlook:
    """Finds a run in its Redis again and again: while that is away, and when the run was begun anew.

    `source` is the file that the config was read from, see `find_key`. Nothing is started, stopped or changed.
    """

    def __init__(self, config: Config, source: Path) -> None:
        self._config, self._source = config, source
        self._clients: list[redis.Redis] = []
        self._url = ""
        self._known: tuple[bytes, Run] | None = None

    def look(self) -> Run:
        """Raises Away; ConfigError for errors that waiting does not fix."""
        url = self._find_url()
        if not self._clients or url != self._url:
            self.close()
            urls, access = self._config.redis.servers or (url,), self._config.redis.access("operator")
            self._clients, self._url = [connect(one, **access) for one in urls], url
        try:
            run_key = self._find_key()
            plane = self._plane(run_key)
            raw = plane.client.get(plane.key("config"))
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(
                f"redis.url {url!r}: Redis refuses the operator: check redis.username, redis.password_file and its ACL"
            ) from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise Away(f"Redis does not answer ({error})") from error
        if not isinstance(raw, bytes):
            raise Away(f"Redis does not know the run {run_key!r}: it has not started, or was lost or cleaned")
        if self._known is None or self._known[0] != raw or self._known[1].run_key != run_key:
            config = working_config(raw, run_key, self._config)
            self._known = raw, Run(config, open_planes(config, self._clients, run_key))
        return self._known[1]

    def close(self) -> None:
        self._known = None
        for client in self._clients:
            client.close()
        self._clients = []

    def _find_url(self) -> str:
        """The config's Redis, or the embedded one of a `katana run` that is running in the folder."""
        if self._config.redis.url is not None:
            return self._config.redis.url
        folder = self._config.run_dir / REDIS
        if not folder.is_dir():
            raise Away(f"no run with a Redis of its own in {self._config.run_dir}")
        url = url_in(folder)
        if url is None:
            raise Away("the run's own Redis is stopped: no `katana run` is running in its folder")
        return url

    def _find_key(self) -> str:
        """By name also in a folder that has no run.json: what is there can be looked at."""
        known = (self._config.run_dir / RUN).is_file()
        home = self._clients[0]
        run_key = find_key(self._config, self._source, home) if known else None
        run_key = run_key or current_run(home, self._config.name)
        if run_key is None:
            raise Away(f"Redis has no run named {self._config.name!r}")
        return run_key

    def _plane(self, run_key: str) -> Plane:
        if self._known is not None and self._known[1].run_key == run_key:
            return self._known[1].plane
        return open_planes(self._config, self._clients, run_key)


# --- acting on a run --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(config: Config, source: Path) -> Iterator[Run]:
    """A run, running or not. `source`: the file that the config was read from, see `find_key`.

    Raises ConfigError: no such run, no Redis to be had, or it went away meanwhile.
    """
    with _awake(config) as config:
        clients = reach(config)
        try:
            run_key = find_key(config, source, clients[0])
            if run_key is None:
                raise ConfigError(f"{config.redis.url}: Redis has no run named {config.name!r}")
            plane = open_planes(config, clients, run_key)
            check_places(config, plane)
            raw = plane.config()
            if not isinstance(raw, bytes):
                raise ConfigError(f"Redis does not know the run {run_key!r}: its data was lost or cleaned")
            config = working_config(raw, run_key, config)
            yield Run(config, open_planes(config, clients, run_key))
        except (RunGone, RedisUnavailable, redis.exceptions.RedisError) as error:
            raise ConfigError(str(error)) from error
        finally:
            for client in clients:
                client.close()


@contextlib.contextmanager
def _awake(config: Config) -> Iterator[Config]:
    """The config with an address of its Redis. A run's own embedded one, or that which the fault harness left, is
    started for as long as this lasts, where no run is at work. Raises ConfigError."""
    _, left = left_by_harness(config.run_dir, config)
    if config.redis.url is not None and left is None:
        yield config
        return
    folder = left or config.run_dir / REDIS
    if not folder.is_dir():
        raise ConfigError(f"redis.url: not set, and there is no run with a Redis of its own in {config.run_dir}")
    held = _hold(config.run_dir)
    if held is None:
        url = url_in(folder)
        if url is None:
            raise ConfigError(
                f"{config.run_dir}: a `katana run` is running, but its Redis is not at {socket_in(folder)}"
            )
        yield with_redis(config, url, config.redis.broker_url)
        return
    with held:
        server = EmbeddedRedis(folder, maxmemory_mb=config.redis.maxmemory_mb)
        try:
            _start(server)
            yield with_redis(config, server.url, config.redis.broker_url)
        finally:
            server.stop()


def _hold(folder: Path) -> IO[str] | None:
    """The lock on a run's folder; None while a `katana run` is running there."""
    try:
        return lock(folder)
    except ConfigError:
        return None


def _start(server: EmbeddedRedis) -> None:
    try:
        server.start()
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


# --- joining a run ----------------------------------------------------------------------------------------------------


def wait_for_key(config: Config, client: redis.Redis, stop: threading.Event) -> str:
    """The id of the run that has the config's name, once there is one. Raises RunGone, Stopping."""
    deadline = time.monotonic() + config.liveness.redis_wait_s
    while (run_key := current_run(client, config.name)) is None:
        if time.monotonic() > deadline:
            raise RunGone(f"Redis has no run named {config.name!r}: start its feeder")
        if stop.wait(0.2):
            raise Stopping
    return run_key


def wait_for_config(config: Config, plane: Plane, stop: threading.Event) -> bytes:
    """A run's config, as Redis holds it. Where Redis has lost it, wait: its feeder, which may itself be starting, opens
    the run again. Raises RunGone, RedisUnavailable, Stopping.

    Ending at once would only make the supervisor restart this role, and give it up in the end.
    """
    deadline = time.monotonic() + config.liveness.redis_wait_s
    logged = False
    while True:
        check_places(config, plane)
        configs = [part.config() for part in plane.parts]
        if configs[0] is not None and None not in configs:
            return configs[0]
        if not logged:
            log.warning("Redis does not know the run %r any more: waiting for its feeder", plane.run_key)
            logged = True
        if time.monotonic() > deadline:
            raise RunGone(f"Redis does not know the run {plane.run_key!r} any more: its feeder opens it again")
        if stop.wait(0.2):
            raise Stopping
