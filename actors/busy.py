"""The share of time that a role is busy, which shows the bottleneck; and how long a role waits when idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyShare:
    """Share of time inside `work()`, over windows of `window_s` seconds."""

    def __init__(self, window_s: float = 2.0) -> None:
        self.share = 0.0
        self._window_s = window_s
        self._began = time.monotonic()
        self._busy = 0.0

    @contextmanager
    def work(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._busy += time.monotonic() - start
            self._roll()

    def _roll(self) -> None:
        now = time.monotonic()
        if now - self._began >= self._window_s:
            self.share = min(1.0, self._busy / (now - self._began))
            self._began, self._busy = now, 0.0


class Idling:
    """How long an idle worker waits before it polls again: a tenth of its idle time so far, between two limits.

    New work waits at most a tenth of the time that there was none, and a thousand idle workers poll a thousand times a
    second, not a hundred thousand times.
    """

    def __init__(self, shortest_s: float, longest_s: float) -> None:
        self._shortest_s, self._longest_s = shortest_s, longest_s
        self._since = time.monotonic()

    def worked(self) -> None:
        self._since = time.monotonic()

    @property
    def idle_s(self) -> float:
        """How long there has been nothing to do."""
        return time.monotonic() - self._since

    @property
    def pause_s(self) -> float:
        return min(max(self._shortest_s, self.idle_s / 10), self._longest_s)
