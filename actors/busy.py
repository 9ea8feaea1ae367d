"""How much of its time a role spends at work: the figure that says who is the bottleneck."""

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
