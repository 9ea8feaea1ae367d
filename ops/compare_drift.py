"""Drift over the cells of a comparison: what the guards of learner/drift.py said early and late, and step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]

GUARDS = ("threshold", "cut_rate_treated", "cut_rate_control", "repetition", "truncation_rate", "entropy")
"""Figures of metrics.jsonl that move when training runs off with itself."""
_LEAST = 3  # steps: of fewer there is no early and late


@dataclass(frozen=True, slots=True)
class Point:
    """A guard at a step, as the mean of the seeds that have it there."""

    step: int
    value: float


def judged(lines: Sequence[Line]) -> list[Line]:
    """Steps in which a rollout with a threshold was trained; of a policy without thresholds all steps.

    Before, a policy that calibrates cuts nothing, which would look like a cut rate that rises.
    """
    return [line for line in lines if line.get("threshold") is not None] or list(lines)


def early_and_late(lines: Sequence[Line]) -> dict[str, float | None]:
    """`{guard}_early` and `{guard}_late`: its means over the first and the last third of the steps that were judged.

    lines: metrics.jsonl, by step. None where a third has no such figure, or there are fewer than three steps.
    """
    steps = judged(lines)
    third = len(steps) // 3
    parts = {"early": steps[:third], "late": steps[len(steps) - third :]} if len(steps) >= _LEAST else {}
    return {
        f"{guard}_{when}": _mean(line.get(guard) for line in parts.get(when, []))
        for guard in GUARDS
        for when in ("early", "late")
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def course(cells: Sequence[Sequence[Line]], guard: str, bins: int = 12) -> list[Point]:
    """A guard over a row's cells: mean over seeds and over the steps of each of at most `bins` stretches of steps."""
    found = [(line["step"], line[guard]) for lines in cells for line in judged(lines) if line.get(guard) is not None]
    if not found:
        return []
    width = max(1, -(-max(step for step, _ in found) // bins))
    places = sorted({(step - 1) // width for step, _ in found})
    groups = [[(step, value) for step, value in found if (step - 1) // width == place] for place in places]
    return [
        Point(round(sum(step for step, _ in group) / len(group)), sum(value for _, value in group) / len(group))
        for group in groups
    ]
