"""How long a teacher may wait for a fuller batch: so long as no rollout waits for its scores.

A forward of a few rows costs nearly as much as one of many, so a teacher that scores every chunk as it comes spends its
time on starting operations. A writer goes on while up to `max_unscored_chunks` of a rollout are unscored: with two of
them it has the time of a whole chunk, of which this takes a part.
"""

from __future__ import annotations

from collections.abc import Iterable

_SHARE = 0.25  # of the time that a rollout may be ahead; the rest is for scoring itself and the way there and back
_LONGEST_S = 0.25
_FULL = 0.5  # share of the rollouts in progress that makes a batch full
_NEWEST = 0.2  # weight of the newest interval in their mean


class Pace:
    """The pace of the rollouts whose chunks one teacher scores. `max_unscored`: `rollout.max_unscored_chunks`."""

    def __init__(self, max_unscored: int) -> None:
        self._ahead = max_unscored - 1  # chunks that may be written while one waits
        self._seen: dict[str, tuple[int, float]] = {}  # by rollout, the newest chunk and when it came
        self._interval_s = 0.0

    def saw(self, chunks: Iterable[tuple[str, int]], now_s: float) -> None:
        """Chunks have come, each as rollout and number."""
        for rid, seq in chunks:
            before = self._seen.get(rid)
            self._seen[rid] = (seq, now_s)
            if before is not None and seq > before[0]:
                interval = (now_s - before[1]) / (seq - before[0])
                first = not self._interval_s
                self._interval_s = interval if first else self._interval_s + _NEWEST * (interval - self._interval_s)
        # A rollout without a chunk for so long has ended, or is not written now.
        for rid in [rid for rid, (_, at) in self._seen.items() if now_s - at > 3 * self._interval_s + _LONGEST_S]:
            del self._seen[rid]

    def over(self, rid: str) -> None:
        """A rollout has ended."""
        self._seen.pop(rid, None)

    def patience_s(self, waiting: int) -> float:
        """How long to wait for more chunks when `waiting` of them are here: 0 if they are a full batch."""
        if waiting >= _FULL * len(self._seen):
            return 0.0
        return min(_SHARE * self._ahead * self._interval_s, _LONGEST_S)
