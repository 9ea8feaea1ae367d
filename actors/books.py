"""The books: a line in `rollouts.jsonl` for every rollout that ended, and its metrics. No torch, no Redis.

`traces.jsonl` (feeder.record_traces) holds tokens and divergences of each verdict, `audit.jsonl` (feeder.record_audit)
the writer of each chunk. Both are on disk before the line in `rollouts.jsonl`, and hold only booked rollouts.

Per rollout, in tokens: generated = kept + detection + overshoot, with detection = trigger - keep and overshoot =
generated - trigger. `tokens_trained` is what the learner trained on, 0 for a dropped rollout; `tokens_trainable` is
what its verdict passes on, also if it was dropped later: this shows the length of the dropped rollouts.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from common import metrics
from common.files import locked, write_text
from common.rids import number_of
from common.runfiles.lines import append_lines, open_whole_lines, rid_of_line, whole_lines
from common.runfiles.names import LEDGER
from common.runfiles.records import UNJUDGED, Audit, BookLine, Chunk, Ledger, Trace
from common.runfiles.run import RunFolder
from common.wire.messages import ChunkTokens, MessageError, ScoreDivergence, Verdict, read_number, row_digest
from common.wire.record import divergence_field, holds_tokens, tokens_field

log = logging.getLogger("katana.books")


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
    # The last stored count is below the trigger only if the record is broken; the identity must hold even then.
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
        tokens_trainable=verdict.train,
    )


def unjudged_line(rid: str, arm: str, problem: int, *, ending: str, reason: str, generated: int) -> BookLine:
    """The line of a rollout that ended before its verdict."""
    return BookLine(
        rid=rid,
        arm=arm,
        problem=problem,
        finish_reason=UNJUDGED,
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


class Booked:
    """A set of rollouts that needs little memory: all admission numbers up to one, and the few above it."""

    def __init__(self) -> None:
        self._upto = 0  # all numbers below are in the set
        self._beyond: set[int] = set()
        self._others: set[str] = set()

    def add(self, rid: str) -> None:
        number = number_of(rid)
        if number < 0:
            self._others.add(rid)
        elif number >= self._upto:
            self._beyond.add(number)
        while self._upto in self._beyond:
            self._beyond.remove(self._upto)
            self._upto += 1

    def __contains__(self, rid: str) -> bool:
        number = number_of(rid)
        return rid in self._others if number < 0 else number < self._upto or number in self._beyond

    @property
    def next_number(self) -> int:
        """The highest admission number plus one."""
        return max(self._beyond, default=self._upto - 1) + 1


class Tally:
    """How many rollouts were admitted and how they ended, by ledger field."""

    def __init__(self, fields: Mapping[str, int]) -> None:
        self.fields = Counter(fields)

    @property
    def open(self) -> int:
        """Admitted and not booked."""
        return 2 * self.fields["admitted"] - self.fields.total()

    def write(self, folder: RunFolder, lock: Path, by_server: Sequence[int] = ()) -> None:
        """Unless another feeder, which took over from this one, has written a later one. `by_server`: how many rollouts
        each of several data servers admitted."""
        ledger = replace(Ledger.of(self.fields), by_server=list(by_server))
        with locked(lock):
            there = folder.ledger
            # Both numbers never fall.
            if there is None or (there.admitted, there.ended) <= (ledger.admitted, ledger.ended):
                write_text(folder.path / LEDGER, json.dumps(ledger.to_json()))


@dataclass(frozen=True, slots=True)
class Booking:
    """A line with its trace and audit."""

    line: BookLine
    verdict: Verdict | None = None
    audit: Audit | None = None


class Books:
    """Appends lines, and remembers which rollouts are booked, so that booking twice has no effect."""

    def __init__(self, folder: Path, *, record_traces: bool, record_audit: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files = RunFolder(folder)
        self.booked = Booked()
        self.endings: Counter[str] = Counter()  # by ledger field
        for line in files.rollouts():
            self._count(line)
        self._lines = open_whole_lines(files.rollouts.path)
        self._traces = self._open_beside(files.traces.path) if record_traces else None
        self._audit = self._open_beside(files.audits.path) if record_audit else None

    def write(self, bookings: Sequence[Booking]) -> None:
        """Book rollouts; they are on disk when this returns. Has no effect for rollouts that are already booked."""
        fresh = {one.line.rid: one for one in bookings if one.line.rid not in self.booked}.values()
        if not fresh:
            return
        append_lines(self._traces, [Trace.of(one.verdict) for one in fresh if one.verdict is not None])
        append_lines(self._audit, [one.audit for one in fresh if one.audit is not None])
        append_lines(self._lines, [one.line for one in fresh])
        for one in fresh:
            self._count(one.line)

    def _open_beside(self, path: Path) -> FileIO:
        """Open for appending after the last line of a booked rollout; later lines are of a crash before booking."""
        file = open_whole_lines(path)
        end = 0
        for place, raw in whole_lines(path):
            if rid_of_line(raw) in self.booked:
                end = place + len(raw)
        file.truncate(end)
        file.seek(0, os.SEEK_END)
        return file

    def _count(self, line: BookLine) -> None:
        self.booked.add(line.rid)
        self.endings[line.ledger_field] += 1
        count(line)

    def close(self) -> None:
        for file in (self._lines, self._traces, self._audit):
            if file is not None:
                file.close()


def _number(rid: str, name: str, value: bytes, otherwise: int) -> int:
    """A count from a rollout's hash; `otherwise` if the field is broken."""
    try:
        return read_number(value, name, high=1 << 16)
    except MessageError as error:
        log.warning("rollout %s: the audit uses %d instead: %s", rid, otherwise, error)
        return otherwise


def audit_of(rid: str, record: dict[bytes, bytes]) -> Audit:
    """The writer and the digests of each chunk, from a rollout's hash at the time of booking."""
    owners = record.get(b"owners", b"").decode("ascii", "replace").split()
    threshold = record.get(b"threshold")
    chunks, stored = record.get(b"chunks", b"0"), sum(map(holds_tokens, record))
    return Audit(
        rid=rid,
        owners=[
            (nonce, _number(rid, "owners", first.encode(), 0))
            for nonce, first in zip(owners[::2], owners[1::2], strict=False)
        ],
        chunks=[_audited_chunk(record, seq) for seq in range(_number(rid, "chunks", chunks, stored))],
        threshold=None if threshold is None else threshold.decode("ascii", "replace"),
        verdict=record.get(b"verdict", b"dead") != b"dead",
    )


def _audited_chunk(record: dict[bytes, bytes], seq: int) -> Chunk:
    try:
        chunk = ChunkTokens.decode(record.get(tokens_field(seq).encode(), b""))
        scored = record.get(divergence_field(seq).encode())
        divergence = None if scored is None else row_digest(ScoreDivergence.decode(scored).divergence)
    except MessageError as error:
        return Chunk(seq, broken=str(error))
    return Chunk(
        seq=seq,
        start=chunk.start,
        n=len(chunk.tokens),
        version=chunk.policy_version,
        writer=chunk.writer,
        finish=chunk.finish,
        tokens=row_digest(chunk.tokens),
        divergence=divergence,
    )


def count(line: BookLine) -> None:
    """Add a line to the metrics; a starting feeder does so for every line in the books."""
    arm, reason = line.arm, line.finish_reason
    metrics.rollouts_finished.labels(arm, reason).inc()
    metrics.tokens_generated.labels(arm).inc(line.tokens_generated)
    metrics.tokens_trained.labels(arm).inc(line.tokens_trained)
    metrics.tokens_detection.labels(arm).inc(line.tokens_detection)
    metrics.tokens_overshoot.labels(arm).inc(line.tokens_overshoot)
    if line.compared:
        metrics.rollout_length.labels(arm, reason).observe(line.tokens_generated)
        metrics.rollout_kept.labels(arm, reason).observe(line.tokens_kept)
    if line.ending == "dropped":
        metrics.trajectories_dropped.labels(line.reason).inc()
    if line.fate != "lost":  # its length was lost with the data of Redis
        metrics.ended_length.labels(line.fate).observe(line.tokens_generated)
    if line.tokens_trainable is not None:
        metrics.ended_trainable.labels(line.fate).observe(line.tokens_trainable)
    if arm == "treated" and line.stopped:
        metrics.stop_overshoot.labels(arm).observe(line.tokens_overshoot)
