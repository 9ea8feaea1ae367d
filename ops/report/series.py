"""How a run went along: series over the tokens generated so far, made of the books. Pure functions, no drawing.

The books are in the order in which rollouts ended. Tokens are counted over all of them, also those that a series
leaves out, so that all series of a run share one axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.runfiles.records import BookLine, Saving
from ops.report.data import Floats, spread
from ops.stats.intervals import wilson
from ops.stats.saving import length_saving

STAGES = {
    "admission to verdict": ("admitted_unix_s", "verdict_unix_s"),
    "verdict to checkpoint": ("verdict_unix_s", "ended_unix_s"),
}
"""What a trained rollout goes through: name → fields of the books between which it lasts. A rollout has ended when a
checkpoint covers the step that it was trained in."""

_RESAMPLES = 200  # of an interval along the way; the last one is the summary's
_SHOWN_THRESHOLDS = 500


def tokens_so_far(lines: Sequence[BookLine]) -> Floats:
    """Tokens generated in all rollouts up to each one, its own included, float [n]."""
    return np.cumsum([line.tokens_generated for line in lines], dtype=np.float64)


# --- the saving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SavingPoint:
    """The length saving over all that was booked up to so many generated tokens, with a 95 % interval."""

    tokens: float
    ratio: float
    low: float
    high: float


def saving_curve(lines: Sequence[BookLine], last: Saving, points: int = 24) -> list[SavingPoint]:
    """The saving so far at up to `points` places; it ends with `last`, the whole run's."""
    tokens = tokens_so_far(lines)
    places = [place for place, line in enumerate(lines) if line.compared]
    # The bootstrap of very long books takes seconds a point.
    ends = spread(places, points if len(places) <= 20_000 else 6)
    curve = []
    for end in ends[:-1]:
        found = _point(tokens[end], length_saving(list(lines[: end + 1]), resamples=_RESAMPLES))
        curve += [] if found is None else [found]
    final = _point(tokens[-1], last) if len(tokens) else None
    return curve + ([] if final is None else [final])


def _point(tokens: float, saving: Saving) -> SavingPoint | None:
    if saving.ratio is None or saving.low is None or saving.high is None:
        return None
    return SavingPoint(float(tokens), saving.ratio, saving.low, saving.high)


# --- the rule ------------------------------------------------------------------------------------------------------


def threshold_curve(lines: Sequence[BookLine]) -> tuple[Floats, Floats]:
    """Tokens so far and the threshold in nats that the newest judged rollout had, two float [n]."""
    known = [(at, line.threshold) for at, line in zip(tokens_so_far(lines), lines, strict=True)]
    points = spread([(at, value) for at, value in known if value is not None], _SHOWN_THRESHOLDS)
    return np.array([at for at, _ in points]), np.array([value for _, value in points])


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `count` rollouts around so many tokens, with a 95 % interval (Wilson's)."""

    tokens: float
    share: float
    low: float
    high: float
    count: int


def fired_curve(lines: Sequence[BookLine], bins: int = 16, arm: str = "treated") -> list[Share]:
    """Share of an arm's rollouts that could be cut in which the policy fired, applied or not, in bins of as many."""
    tokens = tokens_so_far(lines)
    judged = [place for place, line in enumerate(lines) if line.compared and line.arm == arm]
    curve = []
    for part in np.array_split(np.array(judged, dtype=np.int64), min(bins, max(1, len(judged) // 8))):
        if len(part):
            hits = sum(lines[place].fired for place in part)
            low, high = wilson(hits, len(part))
            curve.append(Share(float(tokens[part].mean()), hits / len(part), low, high, len(part)))
    return curve


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of each reason in bins: `tokens` float [b], `shares` reason → float [b] (they sum to 1), `counts`."""

    tokens: Floats
    shares: dict[str, Floats]
    counts: dict[str, int]


def reasons_mix(lines: Sequence[BookLine], arm: str, bins: int = 16) -> Mix:
    """How an arm's rollouts ended, in bins of equally many; the most frequent reason first."""
    tokens = tokens_so_far(lines)
    mine = [place for place, line in enumerate(lines) if line.arm == arm]
    counts = Counter(str(lines[place].finish_reason) for place in mine)
    parts = [
        part for part in np.array_split(np.array(mine, dtype=np.int64), min(bins, max(1, len(mine) // 8))) if len(part)
    ]
    found = [Counter(str(lines[place].finish_reason) for place in part) for part in parts]
    shares = {
        reason: np.array([seen[reason] / seen.total() for seen in found], dtype=np.float64)
        for reason, _ in counts.most_common()
    }
    return Mix(np.array([tokens[part].mean() for part in parts]), shares, dict(counts.most_common()))


# --- staleness and time --------------------------------------------------------------------------------------------


def staleness_counts(lines: Sequence[BookLine]) -> dict[str, Counter[int]]:
    """How many trajectories were how stale, in policy versions, by what became of them: trained | dropped as stale."""
    counts: dict[str, Counter[int]] = {"trained": Counter(), "dropped": Counter()}
    for line in lines:
        if line.staleness is not None:
            if line.ending == "trained":
                counts["trained"][line.staleness] += 1
            elif line.reason == "stale":
                counts["dropped"][line.staleness] += 1
    return counts


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds that a stage took of rollouts around so many tokens: median and 95th percentile."""

    tokens: float
    median_s: float
    p95_s: float
    count: int


def stage_latencies(lines: Sequence[BookLine], stage: str, bins: int = 16) -> list[Latency]:
    """A stage's latencies in bins of equally many rollouts; empty where the books have no times for it."""
    begin, end = STAGES[stage]
    tokens = tokens_so_far(lines)
    timed = [
        (place, max(0.0, getattr(line, end) - getattr(line, begin)))
        for place, line in enumerate(lines)
        if getattr(line, begin) is not None and getattr(line, end) is not None and line.ending == "trained"
    ]
    curve = []
    for part in np.array_split(np.arange(len(timed)), min(bins, max(1, len(timed) // 8))):
        if len(part):
            seconds = np.array([timed[place][1] for place in part])
            median, high = np.quantile(seconds, [0.5, 0.95])
            middle = float(tokens[[timed[place][0] for place in part]].mean())
            curve.append(Latency(middle, float(median), float(high), len(part)))
    return curve
