"""A run's trace in the format of Chrome's trace viewer, which ui.perfetto.dev reads too.

Each process of the run is a process there, with its spans on one thread. Rollouts are asynchronous slices of a process
of their own, one for each stage, and arrows lead through the spans in which a rollout got on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.config import ConfigError
from common.files import write_atomically
from common.runfiles.names import TRACE
from common.runfiles.run import RunFolder
from common.runfiles.tracing import ProcessTrace, TracedStage, read_traces
from ops.plots import named

ROLES = ("feeder", "rollout", "teacher", "arbiter", "learner", "evaluator")
_ROLLOUTS = 1  # the process of the rollouts
_THREAD = 1
# What a rollout does from one stage up to the next.
_AFTER = {
    "admitted": "waits for a writer",
    "taken": "is written",
    "verdict": "waits for the learner",
    "trained": "waits for its booking",
}
Event = dict[str, Any]


def traces_of(run: Path) -> list[ProcessTrace]:
    """The traces of a run's processes, role by role along the data path. Raises ConfigError if there are none."""
    if not RunFolder(run).begun:
        raise ConfigError(f"{run}: not a run's folder; expected one like runs/demo")
    found = list(read_traces(run))
    if not found:
        raise ConfigError(
            f"{run / TRACE}: no trace of this run; a run has one with `trace: true` in its config, which "
            f"`--resume --set trace=true` may add"
        )
    return sorted(found, key=lambda one: _rank(one.process.role))


def _rank(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)


def write_events(traces: Sequence[ProcessTrace], path: Path) -> int:
    """Write the file; returns the number of events. Raises ConfigError if it cannot be written."""
    count = 0

    def write(draft: Path) -> None:
        nonlocal count
        with draft.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[')
            for count, event in enumerate(events_of(traces), start=1):
                file.write(",\n" if count > 1 else "\n")
                json.dump(event, file, separators=(",", ":"))
            file.write("\n]}\n")

    with named(path):
        write_atomically(path, write)
    return count


def events_of(traces: Sequence[ProcessTrace]) -> Iterator[Event]:
    """All events: names first, then spans of each process, then rollouts. Times begin at the first process."""
    origin = min(one.process.at_us for one in traces)
    yield from _names(_ROLLOUTS, "rollouts", "", 0)
    for pid, one in enumerate(traces, start=_ROLLOUTS + 1):
        yield from _names(pid, one.name, f"{one.process.host}, pid {one.process.pid}", pid)
    for pid, one in enumerate(traces, start=_ROLLOUTS + 1):
        # The file's own span shows how long the process served, also where it was killed.
        yield _slice(pid, one.name, "process", one.process.at_us - origin, one.end_us - one.process.at_us, {})
        for span in one.spans:
            yield _slice(pid, span.span, span.kind, span.at_us - origin, span.us, span.facts)
    by_rollout: dict[str, list[tuple[int, TracedStage]]] = {}
    for pid, one in enumerate(traces, start=_ROLLOUTS + 1):
        for stage in one.stages:
            by_rollout.setdefault(stage.rid, []).append((pid, stage))
    for rid in sorted(by_rollout):
        yield from _rollout(rid, sorted(by_rollout[rid], key=lambda pair: pair[1].at_us), origin)


def _names(pid: int, name: str, labels: str, rank: int) -> Iterator[Event]:
    common = {"ph": "M", "pid": pid, "tid": _THREAD}
    yield {**common, "name": "process_name", "args": {"name": name}}
    yield {**common, "name": "process_sort_index", "args": {"sort_index": rank}}
    yield {**common, "name": "thread_name", "args": {"name": "loop" if labels else "stages"}}
    if labels:
        yield {**common, "name": "process_labels", "args": {"labels": labels}}


def _slice(pid: int, name: str, kind: str, at_us: int, us: int, facts: dict[str, int]) -> Event:
    whole = {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": _THREAD, "ts": at_us, "dur": us}
    return {**whole, "args": facts} if facts else whole


def _rollout(rid: str, stages: Sequence[tuple[int, TracedStage]], origin: int) -> Iterator[Event]:
    """Its stages as slices, chunks and scores as points, and an arrow from each stage to the next."""
    common = {"cat": "rollout", "id": rid, "pid": _ROLLOUTS, "tid": _THREAD}
    first, last = stages[0][1].at_us - origin, stages[-1][1].at_us - origin
    yield {**common, "ph": "b", "name": rid, "ts": first}
    phase = ""
    for _, stage in stages:
        at = stage.at_us - origin
        yield {**common, "ph": "n", "name": stage.stage, "ts": at, "args": stage.facts}
        following = _AFTER.get(stage.stage, "")
        if phase and (following or stage.stage == "booked"):
            yield {**common, "ph": "e", "name": phase, "ts": at}
            phase = ""
        if following:
            yield {**common, "ph": "b", "name": following, "ts": at}
            phase = following
    if phase:  # it was not booked: the run or its trace ended before
        yield {**common, "ph": "e", "name": phase, "ts": last}
    yield {**common, "ph": "e", "name": rid, "ts": last}
    if len(stages) > 1:
        for place, (pid, stage) in enumerate(stages):
            mark = "s" if place == 0 else "f" if place == len(stages) - 1 else "t"
            arrow = {"ph": mark, "name": "rollout", "cat": "flow", "id": rid, "pid": pid, "tid": _THREAD}
            yield {**arrow, "ts": stage.at_us - origin, **({"bp": "e"} if mark == "f" else {})}
