"""A run as a replay needs it: its verdicts in the order in which they were given, from its folder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.config import Config, ConfigError
from common.draws import rollout_seed, uniform_bits
from common.policies import ScoredTokens
from common.rids import number_of
from common.runfiles.records import BookLine, Trace
from common.runfiles.run import RunFolder
from common.wire.messages import Floats, Ints


@dataclass(frozen=True, slots=True)
class Replayed:
    """A rollout that had its verdict.

    threshold, trigger, keep, stopped: as recorded. known: verdicts given before it was admitted. version, step: how far
    the run was at its verdict. lot: what its arm was drawn by, 0 to 1. free: nothing could have stopped it, so that its
    divergence (float32 [n], nats) is whole. counts: the figures are about it. view: float32 [3, n], rows as in VIEW;
    None: not on record.
    """

    rid: str
    arm: str
    teacher: str
    problem: int
    seed: int
    lot: float
    threshold: float | None
    trigger: int
    keep: int
    stopped: bool
    correct: bool | None
    known: int
    version: int
    step: int
    free: bool
    counts: bool
    tokens: Ints
    divergence: Floats
    view: Floats | None

    @property
    def scored(self) -> ScoredTokens:
        """As a policy reads it."""
        return ScoredTokens(self.tokens, self.divergence, self.view)


@dataclass(frozen=True, slots=True)
class Recording:
    """A run's rollouts in the order of their verdicts; `unusable`: those without a trace or a time on record."""

    config: Config
    rollouts: list[Replayed]
    unusable: int

    @property
    def counted(self) -> list[int]:
        """Places of the rollouts that the figures are about."""
        return [place for place, rollout in enumerate(self.rollouts) if rollout.counts]

    @property
    def whole(self) -> bool:
        """Whether nothing of the run could have been stopped."""
        return all(rollout.free for rollout in self.rollouts)


def read_record(folder: Path, arm: str | None = None) -> Recording:
    """Read a run's folder.

    `arm`: whose rollouts count, `control` or `all`; None: all where nothing could have been stopped, else control. A
    rollout that could have been stopped never counts: one that was stopped has no end on record, and those that were
    not are a selection.

    Raises:
        ConfigError: no run's folder, a damaged file, or nothing in it that counts.
    """
    run = RunFolder(folder)
    config = run.config
    for file in (run.rollouts, run.traces):
        if not file.path.is_file():
            raise ConfigError(f"{file.path}: there is no such file")
    lines = {line.rid: line for line in run.rollouts() if line.judged}
    traced = list(_traced(run, lines))
    if not traced:
        raise ConfigError(f"{folder}: nothing to replay: no rollout has a trace (feeder.record_traces) and a verdict")
    # Verdicts of one millisecond were given in the order of their names.
    traced.sort(key=lambda one: (one.line.verdict_unix_s or 0.0, one.line.rid))
    rollouts = _rollouts(config, traced, _step_of_version(run), arm)
    record = Recording(config, rollouts, len(lines) - len(rollouts))
    if not record.counted:
        wanted = "control rollout" if arm == "control" or not record.whole else "rollout"
        raise ConfigError(
            f"{folder}: nothing to replay: no {wanted} that ended unstopped; record the run with termination.shadow: "
            f"true, or with a control arm (termination.control_fraction)"
        )
    return record


@dataclass(frozen=True, slots=True)
class _Traced:
    """A line of the books with its trace."""

    line: BookLine
    trace: Trace


def _rollouts(config: Config, traced: Sequence[_Traced], steps: dict[int, int], arm: str | None) -> list[Replayed]:
    """`traced` in the order of the verdicts."""
    stoppable = [config.termination.stops(one.line.arm) and one.line.active for one in traced]
    wanted = arm or ("control" if any(stoppable) else "all")
    verdicts = [one.line.verdict_unix_s or 0.0 for one in traced]
    admissions = [one.line.admitted_unix_s or 0.0 for one in traced]
    known = np.searchsorted(verdicts, admissions, side="right").tolist()
    rollouts, version = [], 0
    for place, (one, bound) in enumerate(zip(traced, stoppable, strict=True)):
        line, trace, number = one.line, one.trace, number_of(one.line.rid)
        # The arbiter's version at a verdict is not on record; one that has written is out. Deterministic: its own.
        written = line.policy_version_first if config.deterministic else line.policy_version_last
        version = written if config.deterministic else max(version, written)
        step = steps.get(version, version)
        rollouts.append(
            Replayed(
                rid=line.rid,
                arm=line.arm,
                teacher=line.teacher,
                problem=line.problem,
                seed=rollout_seed(config.seed, number),
                lot=uniform_bits(config.seed, "arm", number) / 2**64,
                threshold=trace.threshold,
                trigger=trace.trigger,
                keep=trace.keep,
                stopped=trace.stopped,
                correct=line.correct,
                known=min(known[place], place),  # a record of two clocks may have more
                version=step if config.deterministic else version,
                step=step,
                free=not bound,
                counts=not bound and wanted in ("all", line.arm) and replace(line, active=True).compared,
                tokens=trace.tokens,
                divergence=trace.divergence,
                view=trace.view,
            )
        )
    return rollouts


def _traced(run: RunFolder, lines: dict[str, BookLine]) -> Iterator[_Traced]:
    """Each rollout that has a line, a trace and both its times. Raises ConfigError."""
    seen: set[str] = set()
    for trace in run.traces():
        line = lines.get(trace.rid)
        if line is None or line.verdict_unix_s is None or line.admitted_unix_s is None or trace.rid in seen:
            continue
        seen.add(trace.rid)
        yield _Traced(line, trace)


def _step_of_version(run: RunFolder) -> dict[int, int]:
    """The optimizer step that first had a policy version; nothing where the run has no metrics.jsonl."""
    steps: dict[int, int] = {0: 0}
    for step in run.steps():
        steps.setdefault(step.policy_version, step.step)
    return steps
