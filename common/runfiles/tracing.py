"""The lines of a trace's files as records, and reading a run's trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.runfiles import names
from common.runfiles.fields import Record, an_object, stored
from common.runfiles.lines import DamagedLine, read_lines


@dataclass(frozen=True, slots=True)
class TracedProcess(Record):
    """The first line of a file: whose it is. `at_us`: microseconds since 1970, as everywhere here."""

    role: str
    run: str
    host: str
    pid: int
    at_us: int


@dataclass(frozen=True, slots=True)
class TracedSpan(Record):
    """What the process did for `us` microseconds. `kind`: work, redis or wait."""

    span: str
    kind: str
    at_us: int
    us: int
    facts: dict[str, int] = field(default_factory=dict, metadata=stored(sparse=True))

    @property
    def end_us(self) -> int:
        return self.at_us + self.us


@dataclass(frozen=True, slots=True)
class TracedStage(Record):
    """A rollout got to a stage, in this process."""

    rid: str
    stage: str
    at_us: int
    facts: dict[str, int] = field(default_factory=dict, metadata=stored(sparse=True))


@dataclass(frozen=True, slots=True)
class TraceFull(Record):
    """The last line of a file that has as many events as a file may have."""

    full: int
    at_us: int


TraceLine = TracedProcess | TracedSpan | TracedStage | TraceFull
_KINDS: dict[str, type[TraceLine]] = {
    "span": TracedSpan,
    "rid": TracedStage,
    "role": TracedProcess,
    "full": TraceFull,
}


@dataclass(slots=True)
class ProcessTrace:
    """A file. Spans are in the order of their beginning, an outer one before those in it. `damaged`: lines that cannot
    be read; a torn last line is not one of them. `full`: the process went on after the last event."""

    name: str
    process: TracedProcess
    spans: list[TracedSpan]
    stages: list[TracedStage]
    damaged: int
    full: bool

    @property
    def end_us(self) -> int:
        """When the last event ended."""
        ends = [span.end_us for span in self.spans] + [stage.at_us for stage in self.stages]
        return max(ends, default=self.process.at_us)


def read_traces(run: Path) -> Iterator[ProcessTrace]:
    """The traces in a run's folder, by name. A file without its first line (its process was killed at once) is left
    out."""
    for path in sorted((run / names.TRACE).glob("*.jsonl"), key=lambda one: (len(one.name), one.name)):
        damaged: list[DamagedLine] = []
        lines = list(read_lines(path, _decoded, damaged=damaged.append))
        spans = [line for line in lines if isinstance(line, TracedSpan)]
        first = next((line for line in lines if isinstance(line, TracedProcess)), None)
        if first is None:
            continue
        yield ProcessTrace(
            name=path.stem,
            process=first,
            spans=sorted(spans, key=lambda span: (span.at_us, -span.us)),
            stages=[line for line in lines if isinstance(line, TracedStage)],
            damaged=len(damaged),
            full=any(isinstance(line, TraceFull) for line in lines),
        )


def _decoded(tree: Any) -> TraceLine:
    tree = an_object(tree)
    for name, kind in _KINDS.items():
        if name in tree:
            return kind.from_json(tree)
    raise ValueError(f"it has none of {', '.join(_KINDS)}")
