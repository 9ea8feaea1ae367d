"""The files of a finished run as the checker reads them: a line at a time, what is broken noted and left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.config import Config, ConfigError, load
from common.runfiles.lines import DamagedLine, read_lines
from common.runfiles.records import (
    AUDIT,
    CONFIG,
    LEDGER,
    METRICS,
    ROLLOUTS,
    TRACES,
    TRAINED,
    Audit,
    BookLine,
    Trace,
    Trained,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Violation:
    """One statement that does not hold. `rid` is empty where it concerns no single rollout."""

    statement: str
    rid: str
    detail: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The line of metrics.jsonl for the same step."""

    step: int
    policy_version: int
    trajectories: int
    tokens_trained: int


@dataclass(slots=True)
class Records:
    """A run's files, as far as they can be read; `broken` names the rest."""

    config: Config | None = None
    ledger: dict[str, int] | None = None  # by ledger field, with `admitted` and `open`
    booked: Counter[str] = field(default_factory=Counter)  # lines by rid
    books: dict[str, BookLine] = field(default_factory=dict)  # the first line of each
    traces: dict[str, Trace] = field(default_factory=dict)
    judged_again: list[Trace] = field(default_factory=list)  # second traces that differ from the first
    steps: list[Trained] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    audited: bool = False
    broken: list[Violation] = field(default_factory=list)


_FILES = (CONFIG, LEDGER, ROLLOUTS, TRACES, TRAINED, METRICS, AUDIT)


def read_records(folder: Path, *names: str) -> Records:
    """Read some files of a run's folder; all without names."""
    records, wanted = Records(), set(names or _FILES)
    if CONFIG in wanted:
        try:
            records.config = load(folder / CONFIG)
        except ConfigError as error:
            records.broken.append(Violation("record", "", str(error)))
    if LEDGER in wanted:
        try:
            records.ledger = _ledger(json.loads((folder / LEDGER).read_bytes()))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            records.broken.append(Violation("record", "", f"ledger.json: {type(error).__name__}: {error}"[:200]))
    optional = {AUDIT} if records.config is None or records.config.feeder.record_traces else {AUDIT, TRACES}

    def lines(name: str, decode: Callable[[Any], T]) -> Iterator[T]:
        if name not in wanted:
            return
        if not (folder / name).exists() and name not in optional:
            records.broken.append(Violation("record", "", f"{name}: missing"))
        broken: list[DamagedLine] = []
        yield from read_lines(folder / name, decode, damaged=broken.append)
        records.broken += [Violation("record", "", f"{name}:{one.number}: {one.why}") for one in broken]

    for line in lines(ROLLOUTS, BookLine.from_json):
        records.booked[line.rid] += 1
        records.books.setdefault(line.rid, line)
    for trace in lines(TRACES, _trace):
        if records.traces.setdefault(trace.rid, trace) != trace:
            records.judged_again.append(trace)
    records.steps += lines(TRAINED, Trained.from_json)
    records.measured += lines(METRICS, _measured)
    records.audits += lines(AUDIT, Audit.from_json)
    records.audited = (folder / AUDIT).exists()
    return records


def _typed(value: Any, wanted: type[T], name: str) -> T:
    if type(value) is not wanted:
        raise ValueError(f"{name}: {value!r:.40} is not {wanted.__name__}")
    return value


def _whole(tree: dict[str, Any], name: str) -> int:
    number = _typed(tree[name], int, name)
    if number < 0:
        raise ValueError(f"{name}: {number} is below 0")
    return number


def _ledger(tree: Any) -> dict[str, int]:
    dropped = _typed(_typed(tree, dict, "ledger")["dropped"], dict, "dropped")
    counts = {name: _typed(tree[name], int, name) for name in ("admitted", "trained", "dead", "open")}
    return counts | {f"dropped:{reason}": _whole(dropped, reason) for reason in dropped}


def _trace(tree: Any) -> Trace:
    trace = Trace.from_json(tree)
    if not trace.written:
        raise ValueError("no token")
    if not (np.isfinite(trace.divergence).all() and (trace.divergence >= 0).all()):
        raise ValueError("divergence: not finite, or below 0")
    return trace


def _measured(tree: Any) -> Measured:
    return Measured(*(_whole(tree, name) for name in ("step", "policy_version", "trajectories", "tokens_trained")))
