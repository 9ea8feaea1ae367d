"""What grows while a run goes on: counters, and the files of its folder. For those who look on; no Redis."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.config import ConfigError
from common.runfiles.records import BookLine, Step, Trace
from common.runfiles.run import RunFolder
from ops.stats.saving import length_saving

_RATE_S = 10.0  # rates are means over this long
_MOST_COMPARED = 200_000  # rollouts that the saving is worked out from: the newest
_NEWEST = 1024  # booked rollouts that are remembered by their id
_TRACE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class LiveSaving:
    """Length saving with its 95 % interval, of how many rollouts, from where: books | metrics (no interval)."""

    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rollouts: int = 0
    source: str = ""


class Rate:
    """How fast counters of several processes grow together; one that began anew, or is new, counts from then on."""

    def __init__(self, window_s: float = _RATE_S) -> None:
        self._window_s = window_s
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def note(self, process: str, at_s: float, value: float) -> None:
        seen = self._seen.setdefault(process, deque())
        if seen and value < seen[-1][1]:
            seen.clear()
        if not seen or at_s > seen[-1][0]:
            seen.append((at_s, value))
        while len(seen) > 2 and at_s - seen[1][0] >= self._window_s:
            seen.popleft()

    def of(self, process: str) -> float | None:
        """Per second; None before it was seen twice."""
        seen = self._seen.get(process)
        if seen is None or len(seen) < 2:
            return None
        (began, first), (ended, last) = seen[0], seen[-1]
        return (last - first) / (ended - began)

    def keep(self, processes: Iterable[str]) -> None:
        """Forget all others: they are gone."""
        alive = set(processes)
        self._seen = {process: seen for process, seen in self._seen.items() if process in alive}

    def total(self) -> float | None:
        rates = [rate for process in self._seen if (rate := self.of(process)) is not None]
        return sum(rates) if rates else None


# --- the run's folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Compared:
    """As much of a line as the saving takes: there are many."""

    arm: str
    problem: int
    tokens_generated: int
    compared: bool = True


class Folder:
    """What grows in the run's folder: books, steps, traces. All empty where the folder is not to be seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self._books, self._steps = self._folder.rollouts.tail(), self._folder.steps.tail()
        self._cut_back = 0  # how often the steps were cut back to a checkpoint
        self._newest_steps: deque[Step] = deque(maxlen=20)
        self._begin()

    def _begin(self) -> None:
        self._compared: deque[_Compared] = deque(maxlen=_MOST_COMPARED)
        self._fired: deque[bool] = deque(maxlen=256)
        self.newest: dict[str, BookLine] = {}  # lines of the newest rollouts, by id
        self._saving = LiveSaving()
        self._fresh, self._due_at = 0, 0.0

    def read(self) -> None:
        """Take in what is new."""
        renewed = self._books.renewed
        while lines := self._books.read():
            if self._books.renewed != renewed:
                renewed = self._books.renewed
                self._begin()
            for line in lines:
                self._note(line)
        while steps := self._steps.read():
            if self._steps.renewed != self._cut_back:
                self._cut_back = self._steps.renewed
                self._newest_steps.clear()
            self._newest_steps.extend(steps)

    def _note(self, line: BookLine) -> None:
        if line.compared:
            self._compared.append(_Compared(line.arm, line.problem, line.tokens_generated))
            self._fresh += 1
            if line.arm == "treated":
                self._fired.append(line.fired)
        self.newest[line.rid] = line
        if len(self.newest) > _NEWEST:
            del self.newest[next(iter(self.newest))]

    def saving(self) -> LiveSaving:
        """Worked out again when there are new rollouts, and so that it takes a twentieth of the time at most."""
        now = time.monotonic()
        if self._fresh and now >= self._due_at:
            found = length_saving(list(self._compared), resamples=500)
            self._saving = LiveSaving(found.ratio, found.low, found.high, len(self._compared), "books")
            self._fresh = 0
            took = time.monotonic() - now
            self._due_at = now + 20 * took
        return self._saving

    def cut_rate(self) -> float | None:
        """Share of the last 256 treated rollouts that could have been cut in which the policy fired, applied or not."""
        return sum(self._fired) / len(self._fired) if self._fired else None

    @property
    def last_step(self) -> Step | None:
        return self._newest_steps[-1] if self._newest_steps else None

    def trained_per_s(self) -> float | None:
        """Tokens trained on over the last steps; None when the last is a minute old."""
        steps = list(self._newest_steps)
        if len(steps) < 2 or steps[-1].unix_s <= steps[0].unix_s or time.time() - steps[-1].unix_s > 60:
            return None
        return sum(step.tokens_trained for step in steps[1:]) / (steps[-1].unix_s - steps[0].unix_s)

    def traces(self, most: int) -> list[Trace]:
        """The last verdicts on record, oldest first; fewer than `most` where they are long."""
        return self._folder.traces.last(_TRACE_BYTES)[-most:]

    def closed_ledger(self) -> dict[str, int] | None:
        """Counts of a finished run, named as in Redis; None for one that has steps to do or rollouts open."""
        step = self.last_step
        try:
            learner, ledger = self._folder.config.learner, self._folder.ledger
        except ConfigError:
            return None
        if step is None or ledger is None or ledger.open:
            return None
        budget = learner.max_generated_tokens
        spent = budget is not None and step.tokens_generated is not None and step.tokens_generated >= budget
        return ledger.counts if spent or step.step == learner.max_steps else None

    def notes(self) -> list[str]:
        return [f"rollouts.jsonl: {self._books.broken} lines cannot be read"] if self._books.broken else []
