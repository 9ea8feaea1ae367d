"""The heartbeat of a worker or the learner, beside its loop: long work does not make it look dead.

A worker lives as long as its loop turns, and while it is at work that it declared (`busy`: a forward, reading weights)
and that is not too old. A loop that does neither is taken for hung: the pulse falls silent, and others take over what
the worker holds. A process that is stopped or gone has no pulse by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

log = logging.getLogger("katana.pulse")


class Pulse:
    """A thread that calls `say` every `every_s` seconds while the loop lives; used as a context manager.

    turn_s: how long a loop that has declared nothing may not turn. busy_s: how long declared work may take.
    """

    def __init__(self, say: Callable[[], None], *, every_s: float, turn_s: float, busy_s: float) -> None:
        self._say, self._every_s, self._turn_s, self._busy_s = say, every_s, turn_s, busy_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._until = time.monotonic() + turn_s
        self._what = "its loop"

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the thread: after that nothing is said any more."""
        self._end.set()
        self._thread.join()

    def turn(self) -> None:
        """The loop has come round, or the work at hand a step further."""
        self._until = max(self._until, time.monotonic() + self._turn_s)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Declare work that may take longer than a turn may; `what` names it, should it never end."""
        what_before, until_before = self._what, self._until
        self._what, self._until = what, time.monotonic() + self._busy_s
        try:
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
                self._say()
            elif missed == 2:  # not at the first: a process that was stopped may look before its loop comes round
                log.error("no heartbeat any more: this process hangs in %s", self._what)
            if self._end.wait(self._every_s):
                return
