"""The course of a run: series over the tokens generated so far, from the books. Pure functions, no drawing.

The books are in the order in which rollouts ended. Tokens are counted over all rollouts, even those that a series
leaves out, so that all series of a run have the same axis.
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
"""Stages of a trained rollout: name → the fields of the books at their beginning and end. A rollout has ended when a
checkpoint covers its step."""

_RESAMPLES = 200  # of an interval on the way; the last interval is that of the summary
_SHOWN_THRESHOLDS = 500


def tokens_so_far(lines: Sequence[BookLine]) -> Floats:
    """Tokens generated in all rollouts up to and including each one, float [n]."""
    return np.cumsum([line.tokens_generated for line in lines], dtype=np.float64)


# --- the saving ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SavingPoint:
    """The length saving of all rollouts booked up to this number of generated tokens, with a 95 % interval."""

    tokens: float
    ratio: float
    low: float
    high: float


def saving_curve(lines: Sequence[BookLine], last: Saving, points: int = 24) -> list[SavingPoint]:
    """The saving so far at up to `points` positions; the last is `last`, of the whole run."""
    tokens = tokens_so_far(lines)
    places = [place for place, line in enumerate(lines) if line.compared]
    # For very long books the bootstrap takes seconds per point.
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


# --- the policy ------------------------------------------------------------------------------------------------------


def threshold_curve(lines: Sequence[BookLine]) -> tuple[Floats, Floats]:
    """Tokens so far and the threshold in nats of the newest judged rollout, two float [n]."""
    known = [(at, line.threshold) for at, line in zip(tokens_so_far(lines), lines, strict=True)]
    points = spread([(at, value) for at, value in known if value is not None], _SHOWN_THRESHOLDS)
    return np.array([at for at, _ in points]), np.array([value for _, value in points])


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `count` rollouts around this number of tokens, with a 95 % interval (Wilson)."""

    tokens: float
    share: float
    low: float
    high: float
    count: int


def fired_curve(lines: Sequence[BookLine], bins: int = 16, arm: str = "treated") -> list[Share]:
    """Share of an arm's rollouts (that could be cut) in which the policy fired, applied or not, in equal bins."""
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
    """How an arm's rollouts ended, in bins of equal size; the most frequent reason first."""
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
    """Number of trajectories by staleness in policy versions, for trained ones and those dropped as stale."""
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
    """Duration of a stage in seconds for rollouts around this number of tokens: median and 95th percentile."""

    tokens: float
    median_s: float
    p95_s: float
    count: int


def stage_latencies(lines: Sequence[BookLine], stage: str, bins: int = 16) -> list[Latency]:
    """A stage's latencies in bins of equally many rollouts; empty if the books have no times for it."""
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
