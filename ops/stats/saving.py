"""How much shorter the treated rollouts are than those of the control arm, with an interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.runfiles.records import ArmTotals, BookLine, Saving
from ops.stats.intervals import interval, resampled_sums

ARMS = ("treated", "control")


class Comparable(Protocol):
    """What the saving is worked out from: a line of the books, or as much of it."""

    @property
    def arm(self) -> str: ...
    @property
    def problem(self) -> int: ...
    @property
    def tokens_generated(self) -> int: ...
    @property
    def compared(self) -> bool: ...


def length_saving(lines: Sequence[Comparable], *, resamples: int = 2000, seed: int = 0) -> Saving:
    """Length saving over rollouts that the policy could have cut, stale ones included.

    The interval is a bootstrap of the ratio, clustered by prompt: prompts are drawn with replacement, with all their
    rollouts of both arms.
    """
    usable = [line for line in lines if line.compared]
    if {line.arm for line in usable} != set(ARMS):
        return Saving(None, None, None)
    # Of each rollout: tokens and one, treated and control.
    columns = np.zeros((len(usable), 4))
    for row, line in zip(columns, usable, strict=True):
        column = 0 if line.arm == "treated" else 2
        row[column : column + 2] = (line.tokens_generated, 1)
    draws = resampled_sums([line.problem for line in usable], columns, resamples=resamples, seed=seed)
    full = draws[(draws[:, 1] > 0) & (draws[:, 3] > 0)]
    low, high = interval(_ratio(full))
    return Saving(float(_ratio(columns.sum(axis=0)[None])[0]), low, high)


def _ratio(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ratio: npt.NDArray[np.float64] = 1 - (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])
    return ratio


def arm_totals(lines: Sequence[BookLine], arm: str) -> ArmTotals:
    """Sums over the arm's booked rollouts."""
    mine = [line for line in lines if line.arm == arm]
    names = ("tokens_generated", "tokens_kept", "tokens_trained", "tokens_detection", "tokens_overshoot")
    sums = {name: sum(getattr(line, name) for line in mine) for name in names}
    dropped = Counter(line.reason for line in mine if line.ending == "dropped")
    mean = sums["tokens_generated"] / len(mine) if mine else None
    return ArmTotals(rollouts=len(mine), **sums, mean_generated=mean, dropped=dict(sorted(dropped.items())))
