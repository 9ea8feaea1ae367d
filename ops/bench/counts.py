"""What a run's teachers counted, read while it runs: their metrics are gone when they end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from ops.reach.ports import scrape, targets

_EVERY_S = 0.5


class TeacherCounts:
    """Reads the counters of a run's teachers again and again, in a thread. Use as a context manager around the run.

    What the teachers did after the last look, in half a second at most, is in no counter.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looks: list[tuple[float, float, float]] = []  # unix time, tokens scored and rebuilt up to it, of all
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read_on, daemon=True)

    def __enter__(self) -> TeacherCounts:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def forwarded_per_scored(self, since_unix_s: float = 0.0) -> float:
        """Tokens forwarded for each token scored: 1, and those in front of a chunk that were forwarded again, since no
        cache held them. First forwards of prompts do not count.

        `since_unix_s`: from the last look before this time on; where nothing was scored after it, as in a very short
        run, from the beginning. Raises RuntimeError if no teacher was seen after it had scored.
        """
        start = (0.0, 0.0, 0.0)
        _, scored, rebuilt = self._looks[-1] if self._looks else start
        if not scored:
            raise RuntimeError(f"no teacher of {self._folder} served metrics of what it scored")
        first = max((look for look in self._looks if look[0] < since_unix_s and look[1] < scored), default=start)
        return 1 + (rebuilt - first[2]) / (scored - first[1])

    def _read_on(self) -> None:
        seen: dict[str, tuple[float, float]] = {}  # by address: what a teacher that ended has counted stays
        while not self._over.wait(_EVERY_S):
            for one in scrape([target for target in targets(self._folder) if target.role == "teacher"]):
                scored = one.value("katana_decode_tokens_total", role="teacher")
                if scored is not None:
                    seen[one.target.address] = (scored, one.value("katana_rebuilt_tokens_total") or 0.0)
            if seen:
                totals = [sum(counts) for counts in zip(*seen.values(), strict=True)]
                self._looks.append((time.time(), totals[0], totals[1]))
