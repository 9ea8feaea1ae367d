"""Looking at a run from outside, without starting, stopping or changing anything: where its Redis is, and its id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from common.config import Config, ConfigError, parse
from common.streams import connect, current_run, open_plane
from ops.rundir import read_run_key


class Away(Exception):
    """Redis, or the run in it, cannot be seen now; it may come back."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A run in its Redis: its id, the config that it works by, a client, and the beginning of its keys."""

    run_key: str
    config: Config
    client: Any
    prefix: str

    def key(self, name: str) -> str:
        return self.prefix + name


class Outlook:
    """Finds a run in its Redis again and again: while that is away, and when the run was begun anew.

    `source` is the file that the config was read from: in a run's folder it stands for that run, elsewhere for the run
    that has the config's name.
    """

    def __init__(self, config: Config, source: Path) -> None:
        self._config, self._source = config, source
        self._client: Any = None
        self._url = ""
        self._known: tuple[bytes, Config] | None = None

    def look(self) -> Seen:
        """Raises Away; ConfigError for what will not change by waiting."""
        url = self._find_url()
        if self._client is None or url != self._url:
            self.close()
            self._client, self._url = connect(url, **self._config.redis.access("operator")), url
        try:
            run_key = self._run_key()
            plane = open_plane(self._config, self._client, run_key)
            raw = self._client.get(plane.key("config"))
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(
                f"redis.url {url!r}: Redis does not let the operator in: look at redis.username, redis.password_file "
                "and its ACL"
            ) from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise Away(f"Redis does not answer ({error})") from error
        if not isinstance(raw, bytes):
            raise Away(f"Redis does not know the run {run_key!r}: it is not begun, or was lost or cleaned")
        return Seen(run_key, self._parsed(raw, run_key), self._client, plane.prefix)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _find_url(self) -> str:
        """The config's Redis, or the own one of a `katana run` that is at work in the folder."""
        if self._config.redis.url is not None:
            return self._config.redis.url
        folder = self._config.run_dir / "redis"
        socket = folder.resolve() / "redis.sock"
        if not folder.is_dir():
            raise Away(f"no run with a Redis of its own in {self._config.run_dir}")
        if not socket.is_socket():
            raise Away("the run's own Redis is at rest: no `katana run` is at work in its folder")
        return f"unix://{socket}?db=0"

    def _run_key(self) -> str:
        folder = self._config.run_dir
        if self._source.resolve().parent == folder.resolve() and (folder / "run.json").is_file():
            return read_run_key(folder)
        run_key = current_run(self._client, self._config.name)
        if run_key is None:
            raise Away(f"Redis knows no run named {self._config.name!r}")
        return run_key

    def _parsed(self, raw: bytes, run_key: str) -> Config:
        """The run's own config, which may differ from the one given; where the run's folder is, the given one says."""
        if self._known is None or self._known[0] != raw:
            shared = parse(raw, source=f"config of {run_key}")
            access = self._config.redis.model_copy(update={"shards": shared.redis.shards})
            here = {"redis": access, "name": self._config.name, "runs_dir": self._config.runs_dir}
            self._known = raw, shared.model_copy(update=here)
        return self._known[1]
