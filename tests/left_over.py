"""What a test run started: it ends with the run, also when that is interrupted or told to stop.

Processes of the system have sessions of their own, so no signal to the test run's group reaches them. All inherit a
mark in their environment, by which they are found, and ended by pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

MARK = "KATANA_TESTED_BY"
END_WITH_PARENT = "KATANA_TESTS_END_WITH_PARENT"  # set by the Makefile: make, or the shell in between, may be killed
_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def mark() -> None:
    """Mark all that is started from here on, and let SIGTERM and SIGHUP end the run as Ctrl-C does."""
    os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
    for number in _ENDING:
        signal.signal(number, _interrupt)
    if os.environ.pop(END_WITH_PARENT, None):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _interrupt(*_: Any) -> None:
    _hear_no_more()
    raise KeyboardInterrupt


def _hear_no_more() -> None:
    """A test run is often told to end more than once, by Ctrl-C and by the death of the make that started it: what it
    started must be ended all the same."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def marked(value: str) -> list[int]:
    """Pids of the processes, but this one, that carry a mark."""
    wanted, found = f"{MARK}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end(value: str, grace_s: float = 15.0) -> None:
    """End what carries a mark: SIGTERM, then SIGKILL for what is still there."""
    _hear_no_more()
    _send(marked(value), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while marked(value) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left := marked(value):
        _send(left, signal.SIGKILL)
        time.sleep(0.1)


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
