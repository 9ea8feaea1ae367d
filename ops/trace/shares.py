"""How a process spent a stretch of time: computing, waiting for Redis, idle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.runfiles.tracing import ProcessTrace, TracedSpan

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of a stretch, which add up to 1. `idle`: neither work nor a call to Redis, whether in a span or not."""

    work: float
    redis: float
    idle: float


def shares_between(trace: ProcessTrace, begin_us: int, end_us: int) -> TimeShares:
    """Of the part of the stretch in which the process was traced; 1 idle if there is no such part.

    A call to Redis inside work counts as Redis, work inside a wait as work.
    """
    begin, end = max(begin_us, trace.process.at_us), min(end_us, trace.end_us)
    if end <= begin:
        return TimeShares(0.0, 0.0, 1.0)
    busy = [span for span in trace.spans if span.kind != "wait"]
    redis = _covered(_clipped([span for span in busy if span.kind == "redis"], begin, end)) / (end - begin)
    both = _covered(_clipped(busy, begin, end)) / (end - begin)
    return TimeShares(both - redis, redis, 1 - both)


def _clipped(spans: Iterable[TracedSpan], begin: int, end: int) -> list[Interval]:
    parts = ((max(begin, span.at_us), min(end, span.end_us)) for span in spans)
    return [part for part in parts if part[0] < part[1]]


def _covered(parts: Iterable[Interval]) -> int:
    """Microseconds in the union of intervals."""
    total, reached = 0, 0
    for begin, end in sorted(parts):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total
