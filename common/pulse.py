"""The heartbeat of a worker or the learner, from a thread beside its loop: long work does not make it look dead.

A worker is alive while its loop iterates, or while it is in declared work (`busy`: a forward, reading weights) that has
not taken too long. Otherwise its loop is considered hung: the heartbeats stop, and others take over what
the worker holds. A stopped or dead process sends no heartbeats anyway.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from common import tracing

log = logging.getLogger("katana.pulse")


class Pulse:
    """A thread that calls `send` every `every_s` seconds while the loop is alive; used as a context manager.

    turn_s: the longest iteration without declared work. busy_s: how long declared work may take.
    """

    def __init__(self, send: Callable[[], None], *, every_s: float, turn_s: float, busy_s: float) -> None:
        self._send, self._every_s, self._turn_s, self._busy_s = send, every_s, turn_s, busy_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._until = time.monotonic() + turn_s
        self._what = "its loop"

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread: no more heartbeats after that."""
        self._end.set()
        self._thread.join()

    def turn(self) -> None:
        """The loop has begun an iteration, or long work has made progress."""
        self._until = max(self._until, time.monotonic() + self._turn_s)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Declare work that may take longer than an iteration may; `what` names it in the log if it never ends."""
        what_before, until_before = self._what, self._until
        self._what, self._until = what, time.monotonic() + self._busy_s
        try:
            with tracing.span(what):
                yield
        finally:
            self._what = what_before
            self._until = max(until_before, time.monotonic() + self._turn_s)

    @property
    def lives(self) -> bool:
        return time.monotonic() < self._until

    def _beat(self) -> None:
        missed = 0
        while True:
            missed = 0 if self.lives else missed + 1
            if not missed:
                self._send()
            elif missed == 2:  # not at the first: after a SIGCONT this thread may run before the loop does
                log.error("no more heartbeats: this process hangs in %s", self._what)
            if self._end.wait(self._every_s):
                return
