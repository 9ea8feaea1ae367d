"""The numbers of an audit: chances of a right answer with their intervals, by class of cut and by what was continued.

A cut counts once, however many continuations it was given: its value is the share of them that was right. Values of one
prompt hang together, so intervals come from drawing prompts, with all that belongs to them, with replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ops.audit.cuts import CLASSES, Recorded
from ops.stats.intervals import RESAMPLES, interval, resampled_sums, unseen_share

SOURCES = {
    "keep": "the student, from the kept prefix",
    "keep_teacher": "the teacher, from the kept prefix",
    "trigger": "the student, from the trigger: as if it had not been cut",
    "whole": "cut rollouts that were written to their end, by the student of that time",
    "uncut_keep": "the student, from uncut rollouts, at the kept length",
    "uncut_trigger": "the student, from uncut rollouts, at the trigger length",
}
"""What P(correct) is measured from: name in files and tables → meaning."""
ALL = "all cuts"


@dataclass(frozen=True, slots=True)
class Audited:
    """A cut that was looked at: its class, the tokens that hold its answer, what it was compared with, and for each
    source the share of right continuations (whole: 0 or 1; None: not to be had)."""

    record: Recorded
    kind: str
    answer: int | None
    uncut: Recorded | None
    right: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Chance:
    """A mean over `rollouts` cuts of `prompts` prompts, with its 95 % interval."""

    mean: float
    low: float
    high: float
    rollouts: int
    prompts: int


def chance(
    values: Sequence[float], prompts: Sequence[int], *, floor: float = 0.0, seed: int = 0, resamples: int = RESAMPLES
) -> Chance | None:
    """The mean of values between `floor` and 1, each of the prompt beside it; None of no value.

    The interval is a bootstrap by prompt, percentiles. Where the drawn means are all the same (every prompt alike, or
    one prompt) it would have no width; then `unseen_share` of all prompts may be otherwise.
    """
    if not values:
        return None
    sums = resampled_sums(prompts, np.column_stack([values, np.ones(len(values))]), resamples=resamples, seed=seed)
    low, high = interval(sums[:, 0] / sums[:, 1])
    mean, count = float(np.mean(values)), len(set(prompts))
    if high - low < 1e-12:
        unseen = unseen_share(count)
        low, high = mean - (mean - floor) * unseen, mean + (1 - mean) * unseen
    return Chance(mean, low, high, len(values), count)


@dataclass(frozen=True, slots=True)
class CutClass:
    """A class of cuts, or all: how many, and P(correct) by source.

    `recoverable`: cuts from whose kept prefix at least one continuation of the student was right. `kept_against_uncut`,
    `trigger_against_uncut`: mean difference of a cut and of the uncut rollout it was compared with.
    """

    kind: str
    cuts: int
    chances: Mapping[str, Chance | None]
    recoverable: Chance | None
    kept_against_uncut: Chance | None
    trigger_against_uncut: Chance | None


def rows_of(cuts: Sequence[Audited], seed: int) -> list[CutClass]:
    """All cuts, then each class that occurs."""
    parts = [(ALL, list(cuts))] + [(kind, [one for one in cuts if one.kind == kind]) for kind in CLASSES]
    return [_row(kind, part, seed) for kind, part in parts if part]


def _row(kind: str, cuts: Sequence[Audited], seed: int) -> CutClass:
    found = [(one.right["keep"], one) for one in cuts]
    judged = [(float(share > 0), one.record.problem) for share, one in found if share is not None]
    return CutClass(
        kind=kind,
        cuts=len(cuts),
        chances={source: _chance_of(cuts, source, seed) for source in SOURCES},
        recoverable=chance([value for value, _ in judged], [prompt for _, prompt in judged], seed=seed),
        kept_against_uncut=_difference(cuts, "keep", "uncut_keep", seed),
        trigger_against_uncut=_difference(cuts, "trigger", "uncut_trigger", seed),
    )


def _chance_of(cuts: Sequence[Audited], source: str, seed: int) -> Chance | None:
    """Of an uncut rollout the prompt is its own."""
    values, prompts = [], []
    for one in cuts:
        value, of = one.right[source], one.uncut if source.startswith("uncut") else one.record
        if value is not None and of is not None:
            values.append(value)
            prompts.append(of.problem)
    return chance(values, prompts, seed=seed)


def _difference(cuts: Sequence[Audited], source: str, other: str, seed: int) -> Chance | None:
    values, prompts = [], []
    for one in cuts:
        value, against = one.right[source], one.right[other]
        if value is not None and against is not None:
            values.append(value - against)
            prompts.append(one.record.problem)
    return chance(values, prompts, floor=-1.0, seed=seed)
