"""The files of a finished run as the checker reads them: a line at a time, what is broken noted and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from common.config import Config, ConfigError
from common.runfiles.fields import Record
from common.runfiles.lines import DamagedLine, Lines
from common.runfiles.names import AUDIT, CONFIG, LEDGER, METRICS, ROLLOUTS, TRACES, TRAINED
from common.runfiles.records import Audit, BookLine, Ledger, Step, Trace, Trained
from common.runfiles.run import RunFolder

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Violation:
    """One statement that does not hold. `rid` is empty where it concerns no single rollout."""

    statement: str
    rid: str
    detail: str


@dataclass(slots=True)
class Records:
    """A run's files, as far as they can be read; `broken` names the rest."""

    config: Config | None = None
    ledger: Ledger | None = None
    booked: Counter[str] = field(default_factory=Counter)  # lines by rid
    books: dict[str, BookLine] = field(default_factory=dict)  # the first line of each
    traces: dict[str, Trace] = field(default_factory=dict)
    judged_again: list[Trace] = field(default_factory=list)  # second traces that differ from the first
    trained: list[Trained] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    audited: bool = False
    broken: list[Violation] = field(default_factory=list)

    def note(self, detail: str) -> None:
        self.broken.append(Violation("record", "", detail))

    def lines(self, file: Lines[R], wanted: Collection[str]) -> Iterator[R]:
        """Those that can be read; none of a file that is not wanted."""
        damaged: list[DamagedLine] = []
        if file.path.name in wanted:
            yield from file(damaged=damaged.append)
        for one in damaged:
            self.note(f"{file.path.name}:{one.number}: {one.why}")


_FILES = (CONFIG, LEDGER, ROLLOUTS, TRACES, TRAINED, METRICS, AUDIT)


def read_records(folder: Path, *names: str) -> Records:
    """Read some files of a run's folder; all without names."""
    run, records, wanted = RunFolder(folder), Records(), set(names or _FILES)
    for name, field_name in ((CONFIG, "config"), (LEDGER, "ledger")):
        try:
            if name in wanted:
                setattr(records, field_name, getattr(run, field_name))
        except ConfigError as error:
            records.note(str(error))
    untraced = records.config is not None and not records.config.feeder.record_traces
    for name in wanted - {CONFIG, AUDIT} - ({TRACES} if untraced else set()):
        if not (folder / name).exists():
            records.note(f"{name}: missing")
    for line in records.lines(run.rollouts, wanted):
        records.booked[line.rid] += 1
        records.books.setdefault(line.rid, line)
    for trace in records.lines(run.traces, wanted):
        if records.traces.setdefault(trace.rid, trace) != trace:
            records.judged_again.append(trace)
    records.trained += records.lines(run.trained, wanted)
    records.steps += records.lines(run.steps, wanted)
    records.audits += records.lines(run.audits, wanted)
    records.audited = run.audits.path.exists()
    return records
