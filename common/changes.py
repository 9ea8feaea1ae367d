"""Change points in a stream of numbers, one a token. No Redis, no clock.

    Cusum           Page, "Continuous inspection schemes", Biometrika 41, 1954

Invariant: what is found is a function of the numbers; how these were cut into chunks cannot change it.
"""

from __future__ import annotations

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
