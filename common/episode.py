"""What lasts for a while is said when it begins and when it is over, not each time that it is met."""

from __future__ import annotations

import logging
import time

_QUIET_S = 10.0  # without it before it counts as over: what comes and goes is one episode


class Episode:
    """One condition, seen from a loop: `seen` each time that it holds, `not_seen` each time that it does not."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._began = self._last = 0.0
        self._times = 0

    def seen(self, text: str) -> None:
        """It holds: said once an episode, with `text`."""
        now = time.monotonic()
        if not self._times:
            self._log.warning("%s", text)
            self._began = now
        self._last = now
        self._times += 1

    def not_seen(self, text: str) -> None:
        """It does not: after a while `text` is said, with how long it had lasted and how often it was met."""
        if self._times and time.monotonic() - self._last >= _QUIET_S:
            self._log.warning("%s: it lasted %.0f s (%d times)", text, self._last - self._began, self._times)
            self._times = 0
