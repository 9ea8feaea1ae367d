"""The books: a line in `rollouts.jsonl` for every rollout that ended, and the same in the metrics. No torch, no Redis.

Per rollout, in tokens: generated = kept + detection + overshoot, with detection = trigger - keep and overshoot =
generated - trigger. `tokens_trained` is what the learner was given, 0 for a rollout that was dropped.
"""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from common import metrics
from common.messages import Verdict


@dataclass(frozen=True, slots=True)
class BookLine:
    """A finished rollout. `ending`: trained | dropped | dead; `reason`: why it was dropped or died."""

    rid: str
    arm: str
    problem: int
    finish_reason: str
    ending: str
    reason: str
    active: bool  # whether the policy could have cut it
    tokens_generated: int
    tokens_kept: int
    tokens_trained: int
    tokens_detection: int
    tokens_overshoot: int
    threshold: float | None
    min_window: float | None
    policy_version_first: int
    policy_version_last: int
    staleness: int | None
    correct: bool | None

    @property
    def ledger_field(self) -> str:
        return ledger_field(self.ending, self.reason)


def ledger_field(ending: str, reason: str) -> str:
    """trained | dead | dropped:REASON, as the ledger counts them."""
    return f"dropped:{reason}" if ending == "dropped" else ending


def line_of(
    verdict: Verdict,
    *,
    ending: str,
    reason: str,
    generated: int,
    staleness: int | None,
    active: bool,
    correct: bool | None,
) -> BookLine:
    """The line of a rollout that has a verdict."""
    # The last stored count may lie below the trigger only if the record is broken; the identity must hold anyway.
    generated = max(generated, verdict.trigger)
    return BookLine(
        rid=verdict.rid,
        arm=verdict.arm,
        problem=verdict.problem,
        finish_reason=verdict.finish_reason,
        ending=ending,
        reason=reason,
        active=active,
        tokens_generated=generated,
        tokens_kept=verdict.keep,
        tokens_trained=verdict.train if ending == "trained" else 0,
        tokens_detection=verdict.trigger - verdict.keep,
        tokens_overshoot=generated - verdict.trigger,
        threshold=verdict.threshold,
        min_window=verdict.min_window,
        policy_version_first=verdict.first_version,
        policy_version_last=verdict.last_version,
        staleness=staleness,
        correct=correct,
    )


def unjudged_line(rid: str, arm: str, problem: int, *, ending: str, reason: str, generated: int) -> BookLine:
    """The line of a rollout that ended before its verdict."""
    return BookLine(
        rid=rid,
        arm=arm,
        problem=problem,
        finish_reason="unfinished",
        ending=ending,
        reason=reason,
        active=False,
        tokens_generated=generated,
        tokens_kept=generated,
        tokens_trained=0,
        tokens_detection=0,
        tokens_overshoot=0,
        threshold=None,
        min_window=None,
        policy_version_first=0,
        policy_version_last=0,
        staleness=None,
        correct=None,
    )


class Books:
    """Appends lines; knows which rollouts are booked, so that booking twice does nothing."""

    def __init__(self, folder: Path, *, record_traces: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.booked: set[str] = set()
        self.endings: Counter[str] = Counter()  # by ledger field
        for line in read_lines(folder / "rollouts.jsonl"):
            self._count(line)
        self._lines = _open_whole_lines(folder / "rollouts.jsonl")
        self._traces = _open_whole_lines(folder / "traces.jsonl") if record_traces else None

    def write(self, line: BookLine, verdict: Verdict | None) -> None:
        """Put a rollout on record, on disk when this returns; without effect if it is there."""
        if line.rid in self.booked:
            return
        if self._traces is not None and verdict is not None:
            self._traces.write(_json_line(trace_of(verdict)))
        self._lines.write(_json_line(asdict(line)))
        os.fsync(self._lines.fileno())
        self._count(asdict(line))

    @property
    def next_cursor(self) -> int:
        """How many rollouts were admitted at least: the highest number on record and one."""
        return max((int(rid[1:]) for rid in self.booked if rid[1:].isdigit()), default=-1) + 1

    def _count(self, line: dict[str, Any]) -> None:
        self.booked.add(line["rid"])
        self.endings[ledger_field(line["ending"], line["reason"])] += 1
        count(line)

    def close(self) -> None:
        self._lines.close()
        if self._traces is not None:
            self._traces.close()


def trace_of(verdict: Verdict) -> dict[str, Any]:
    """Tokens (int32) and divergences (float32), exact, as base64 of little-endian bytes."""
    return {
        "rid": verdict.rid,
        "arm": verdict.arm,
        "problem": verdict.problem,
        "trigger": verdict.trigger,
        "keep": verdict.keep,
        "cut": verdict.cut,
        "threshold": verdict.threshold,
        "version": verdict.first_version,
        "tokens": base64.b64encode(verdict.tokens.tobytes()).decode(),
        "divergence": base64.b64encode(verdict.divergence.tobytes()).decode(),
    }


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a torn last one is left out. Nothing where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                yield json.loads(raw)


def count(line: dict[str, Any]) -> None:
    """Put a line into the metrics; also done for every line on record when a feeder starts."""
    arm, reason = line["arm"], line["finish_reason"]
    metrics.rollouts_finished.labels(arm, reason).inc()
    metrics.tokens_generated.labels(arm).inc(line["tokens_generated"])
    metrics.tokens_trained.labels(arm).inc(line["tokens_trained"])
    metrics.tokens_detection.labels(arm).inc(line["tokens_detection"])
    metrics.tokens_overshoot.labels(arm).inc(line["tokens_overshoot"])
    metrics.rollout_length.labels(arm, reason).observe(line["tokens_generated"])
    metrics.rollout_kept.labels(arm, reason).observe(line["tokens_kept"])
    if line["ending"] == "dropped":
        metrics.trajectories_dropped.labels(line["reason"]).inc()
    if arm == "treated" and line["tokens_detection"]:
        metrics.stop_overshoot.observe(line["tokens_overshoot"])


def _json_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _open_whole_lines(path: Path) -> FileIO:
    """Open for appending behind the last whole line: what a crash tore off was never acknowledged."""
    file = FileIO(path, "a+")
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        file.seek(begin)
        newline = (file.read(end - begin) or b"").rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        file.truncate(end)
    file.seek(0, os.SEEK_END)
    return file
