"""What grows while a run goes on: counters, and the files of its folder. For those who look on; no Redis."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import ConfigError, load
from common.runfiles.lines import Tail, an_object, last_lines
from common.runfiles.records import CONFIG, LEDGER, METRICS, ROLLOUTS, TRACES, BookLine, Trace
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
        self._folder = folder
        self._books, self._steps = Tail(folder / ROLLOUTS, BookLine.from_json), Tail(folder / METRICS, an_object)
        self._cut_back = 0  # how often the steps were cut back to a checkpoint
        self.steps: deque[dict[str, Any]] = deque(maxlen=20)
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
                self.steps.clear()
            self.steps.extend(steps)

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

    def last_step(self, name: str) -> Any:
        return self.steps[-1].get(name) if self.steps else None

    def trained_per_s(self) -> float | None:
        """Tokens trained on over the last steps; None when the last is a minute old."""
        try:
            timed = [(float(line["unix_s"]), int(line["tokens_trained"])) for line in self.steps]
        except (KeyError, TypeError, ValueError):
            return None
        if len(timed) < 2 or timed[-1][0] <= timed[0][0] or time.time() - timed[-1][0] > 60:
            return None
        return sum(tokens for _, tokens in timed[1:]) / (timed[-1][0] - timed[0][0])

    def traces(self, most: int) -> list[Trace]:
        """The last verdicts on record, oldest first; fewer than `most` where they are long."""
        return last_lines(self._folder / TRACES, Trace.from_json, _TRACE_BYTES)[-most:]

    def closed_ledger(self) -> dict[str, int] | None:
        """Counts of a finished run, named as in Redis; None for one that has steps to do or rollouts open."""
        try:
            learner = load(self._folder / CONFIG).learner
            ledger = json.loads((self._folder / LEDGER).read_bytes())
            dropped = {f"dropped:{reason}": int(many) for reason, many in ledger["dropped"].items()}
            counts = {name: int(ledger[name]) for name in ("admitted", "trained", "dead", "open")}
        except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        tokens, budget = self.last_step("tokens_generated"), learner.max_generated_tokens
        spent = budget is not None and tokens is not None and tokens >= budget
        if not (self.last_step("step") == learner.max_steps or spent) or counts.pop("open"):
            return None
        return counts | dropped

    def notes(self) -> list[str]:
        return [f"rollouts.jsonl: {self._books.broken} lines cannot be read"] if self._books.broken else []
