"""Drift over the cells of a comparison: the guards of learner/drift.py early and late, and step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.policies import POLICIES
from common.runfiles.records import Step

GUARDS = ("threshold", "cut_rate_treated", "cut_rate_control", "repetition", "truncation_rate", "entropy")
"""Figures of metrics.jsonl that move when training diverges."""
_LEAST = 3  # steps: fewer cannot be divided into early and late


@dataclass(frozen=True, slots=True)
class GuardPoint:
    """A guard in the middle of a stretch of steps."""

    step: float
    value: float


def judged(steps: Sequence[Step], policy: str) -> list[Step]:
    """The steps in which the policy could have cut, by step: those in which a rollout with a number was trained.

    Before that a policy that calibrates cuts nothing, which would look like a cut rate that rises. In its first steps
    some rollouts still began without a number. Of a policy that needs no number, all steps; of one of the user's own,
    all where none has one.
    """
    known = POLICIES.get(policy)
    waits = known is not None and policy != "none" and not known.active(None)
    numbered = [step for step in steps if step.threshold is not None]
    return sorted(numbered if numbered or waits else steps, key=lambda step: step.step)


def cut_something(cells: Iterable[Sequence[Step]]) -> bool:
    """Whether a treated rollout was cut in any step of these cells."""
    return any(step.cut_rate_treated for steps in cells for step in steps)


def early_and_late(steps: Sequence[Step]) -> dict[str, float | None]:
    """`{guard}_early` and `{guard}_late`: its means over the first and the last third of the judged steps.

    None where a third has no such figure, or there are fewer than three steps.
    """
    third = len(steps) // 3
    parts = {"early": steps[:third], "late": steps[len(steps) - third :]} if len(steps) >= _LEAST else {}
    return {
        f"{guard}_{when}": mean_known(getattr(step, guard) for step in parts.get(when, []))
        for guard in GUARDS
        for when in ("early", "late")
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def course(cells: Sequence[Sequence[Step]], guard: str, bins: int = 12) -> list[GuardPoint]:
    """A guard along a row's cells: at most `bins` points, each the mean over the cells of their means over a stretch of
    steps. Stretches that not all cells have are left out, or the line would move where a cell begins or ends; empty
    where there is none."""
    last = max((step.step for steps in cells for step in steps), default=0)
    width = max(1, -(-last // bins))
    points = []
    for begin in range(1, last + 1, width):
        stretches = [[step for step in steps if begin <= step.step < begin + width] for steps in cells]
        means = [mean_known(getattr(step, guard) for step in stretch) for stretch in stretches]
        known = [mean for mean in means if mean is not None]
        if known and len(known) == len(means):
            points.append(GuardPoint(begin + (width - 1) / 2, sum(known) / len(known)))
    return points
