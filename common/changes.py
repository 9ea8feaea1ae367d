"""Change points in a stream of numbers, one a token: two published tests. No Redis, no clock.

    Cusum           Page, "Continuous inspection schemes", Biometrika 41, 1954
    AdaptiveWindow  ADWIN: Bifet and Gavaldà, "Learning from time-changing data with adaptive windowing", SDM 2007

Invariant: what is found is a function of the numbers; how these were cut into chunks cannot change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Change:
    """A change that was found after `seen` numbers; `before`: how many of them stand before it, as estimated."""

    seen: int
    before: int


class Cusum:
    """Page's cumulative sum for a fall of the mean. The first `grace` numbers are not read; μ is the mean of the
    `reference` numbers after them; then

        S_t = max(0, S_{t-1} + μ - x_t - drift)        found where S_t > threshold

    and the change is estimated to be where S was 0 last. A number beyond ±threshold / 2 counts as that, so that no
    single one is a change. `rise`: for a rise, the same on negated numbers. `threshold` None: nothing is found.
    """

    def __init__(
        self, *, grace: int, reference: int, drift: float, threshold: float | None, rise: bool = False
    ) -> None:
        if grace < 0 or reference < 1 or drift < 0 or (threshold is not None and threshold <= 0):
            raise ValueError(
                f"grace {grace} and drift {drift} must be at least 0, reference {reference} at least 1, threshold "
                f"{threshold} above 0"
            )
        self._grace, self._reference, self._drift = grace, reference, drift
        self._threshold = threshold
        self._sign = -1.0 if rise else 1.0
        self._seen = self._before = 0
        self._total = self._sum = 0.0
        self._over = threshold is None

    def feed(self, values: npt.NDArray[np.floating]) -> Change | None:
        """Take the next numbers, float [n]; the Change once, where it is found."""
        if self._over or self._threshold is None:
            return None
        threshold, most, first = self._threshold, self._threshold / 2, self._grace + self._reference
        for value in values.tolist():
            self._seen += 1
            if self._seen <= self._grace:
                continue
            value = min(max(self._sign * value, -most), most)
            if self._seen <= first:
                self._total += value
                self._before = self._seen
                continue
            self._sum += self._total / self._reference - value - self._drift
            if self._sum <= 0:
                self._sum, self._before = 0.0, self._seen
            elif self._sum > threshold:
                self._over = True
                return Change(self._seen, self._before)
        return None


class AdaptiveWindow:
    """ADWIN for a fall of the mean, over the newest numbers: at most `most_blocks` blocks of `block` numbers each.

    After each block, every place between two blocks splits the window of n numbers into an older part (n0, mean μ0)
    and a newer one (n1, μ1). With σ² the variance of the window, R the range of the numbers, and 1/m = 1/n0 + 1/n1,

        ε = sqrt(2 σ² L / m) + 2 R L / (3 m),        L = ln(2 n / delta)

    bounds |μ0 - μ1| (Bernstein) where the mean has not changed and the numbers are independent. Of the splits that
    exceed it, that by the most decides: where the newer part is lower, the change is found there; where it is higher,
    the older part is forgotten, and the rest is looked at again. Numbers are cut to 0 … R. `delta` None: nothing is
    found.
    """

    def __init__(self, *, grace: int, block: int, most_blocks: int, top: float, delta: float | None) -> None:
        if grace < 0 or block < 1 or most_blocks < 2 or top <= 0 or (delta is not None and not 0 < delta < 1):
            raise ValueError(
                f"grace {grace} must be at least 0, block {block} at least 1, most_blocks {most_blocks} at least 2, "
                f"top {top} above 0, delta {delta} between 0 and 1"
            )
        self._block, self._most, self._top, self._delta = block, most_blocks, top, delta
        self._skip = self._seen = grace
        self._rest: list[float] = []  # of a block that is not whole
        self._sums: list[float] = []
        self._squares: list[float] = []
        self._over = delta is None

    def feed(self, values: npt.NDArray[np.floating]) -> Change | None:
        """Take the next numbers, float [n]; the Change once, where it is found."""
        if self._over:
            return None
        skipped = min(self._skip, len(values))
        self._skip -= skipped
        self._rest += values[skipped:].tolist()
        while len(self._rest) >= self._block:
            part, self._rest = self._rest[: self._block], self._rest[self._block :]
            newer = self._add(np.clip(np.array(part, np.float64), 0.0, self._top))
            if newer is not None:
                self._over = True
                return Change(self._seen, self._seen - newer * self._block)
        return None

    def _add(self, part: npt.NDArray[np.float64]) -> int | None:
        """Add a block; the number of blocks after the change, if there is one."""
        self._seen += self._block
        self._sums = [*self._sums, float(part.sum())][-self._most :]
        self._squares = [*self._squares, float((part * part).sum())][-self._most :]
        while len(self._sums) > 1:
            split, excess, fell = self._best_split()
            if excess <= 0:
                return None
            if fell:
                return len(self._sums) - split
            self._sums, self._squares = self._sums[split:], self._squares[split:]
        return None

    def _best_split(self) -> tuple[int, float, bool]:
        """Blocks before the split whose means differ most beyond the bound; by how much; whether the newer is lower."""
        blocks, n = len(self._sums), len(self._sums) * self._block
        before = np.cumsum(self._sums)
        n0 = np.arange(1, blocks) * float(self._block)
        n1 = n - n0
        difference = before[:-1] / n0 - (before[-1] - before[:-1]) / n1
        mean = before[-1] / n
        variance = max(0.0, sum(self._squares) / n - mean * mean)
        log, inverse = math.log(2 * n / (self._delta or 1.0)), 1 / n0 + 1 / n1
        excess = np.abs(difference) - np.sqrt(2 * variance * log * inverse) - 2 * self._top * log * inverse / 3
        best = int(excess.argmax())
        return best + 1, float(excess[best]), bool(difference[best] > 0)
