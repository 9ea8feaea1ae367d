"""Logs a lasting condition when it begins and when it ends, not each time that it is seen."""

from __future__ import annotations

import logging
import time

_QUIET_S = 10.0  # without the condition before it counts as over: a condition that comes and goes is one episode


class Episode:
    """One condition, seen from a loop: `seen` each time that it holds, `not_seen` each time that it does not."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._began = self._last = 0.0
        self._times = 0

    def seen(self, text: str) -> None:
        """The condition holds: log `text`, once an episode."""
        now = time.monotonic()
        if not self._times:
            self._log.warning("%s", text)
            self._began = now
        self._last = now
        self._times += 1

    def not_seen(self, text: str) -> None:
        """The condition does not hold: after `_QUIET_S` log `text`, with its duration and the number of times."""
        if self._times and time.monotonic() - self._last >= _QUIET_S:
            self._log.warning("%s: it lasted %.0f s (%d times)", text, self._last - self._began, self._times)
            self._times = 0
