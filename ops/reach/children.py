"""Processes that a command starts: each in a session of its own, ended in order, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from common import own_packages

# Loaded before any fork: a child may not load libraries.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class Child(Protocol):
    """What is asked of a child that was started; `subprocess.Popen` has it. Codes are those of Popen."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


def start(
    command: Sequence[str],
    log: Path | IO[bytes],
    environment: Mapping[str, str] | None = None,
    *,
    keep: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a child; what it prints is added to `log`, `environment` to this process's. `keep`: file descriptors that
    it has too.

    It has its own session: Ctrl-C reaches only this process, which stops the others in order.
    """
    with log.open("ab") if isinstance(log, Path) else contextlib.nullcontext(log) as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=own_packages.environment() | dict(environment or {}),
            start_new_session=True,
            pass_fds=keep,
            preexec_fn=end_with_parent(),
        )


def katana(*words: str) -> list[str]:
    """The command `katana WORDS`, by this interpreter."""
    return [sys.executable, "-m", "ops.cli", *words]


def end(children: Sequence[Child], grace_s: float, *, at_once: Callable[[], bool] = lambda: False) -> None:
    """SIGTERM to all, then wait, `grace_s` for all together or until `at_once`; those still running are killed."""
    running = [child for child in children if child.poll() is None]
    for child in running:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for child in running:
        while child.poll() is None and time.monotonic() < deadline and not at_once():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)
    for child in running:
        if child.poll() is None:
            child.kill()
            child.wait()


def end_with_parent() -> Callable[[], None] | None:
    """For Popen's preexec_fn: the child gets SIGTERM when its parent dies, however it dies (Linux; elsewhere nothing).

    Sessions of their own keep Ctrl-C away from children; without this a killed parent would leave them running on a
    folder that the next `katana run --resume` works in. The kernel ties the signal to the thread that forks, so only
    the main thread, which lives as long as the program, may ask for it.
    """
    if _LIBC is None or threading.current_thread() is not threading.main_thread():
        return None
    return ask_for_signal


def ask_for_signal(number: signal.Signals = signal.SIGTERM) -> None:
    """This process gets the signal when its parent dies (Linux)."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
