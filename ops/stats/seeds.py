"""Statistics over seeds for `katana compare`: pure functions of a few numbers, one a seed.

A cell is one draw from "this setting, any seed", so what is spread over is seeds, and there are few of them. Two
intervals are given, and the verdict follows the first:

    t           mean ± t · s / √n, t of Student's distribution with n - 1 degrees of freedom. Right for values that are
                roughly normal, also for n = 3.
    bootstrap   percentiles of the means of n values drawn with replacement. It needs no shape, but it is too narrow for
                few seeds: it leaves out the factor √(n / (n - 1)) and takes the normal quantile for the t one. Of 5
                normal values it covers the truth in about 83 % of all cases and not in 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
FEWEST_SEEDS = 3
"""Below, an interval has one degree of freedom: of evaluations as coarse as k samples give, it calls too much."""
VERDICTS = ("higher", "lower", "no difference seen")
ROUNDING = 1e-9
"""As a share: numbers that differ by no more are the same but for the rounding of floats."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `n` seeds with its 95 % t interval; None where one seed gives none."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half of its width."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True, slots=True)
class Paired:
    """Differences of two settings, seed by seed: mean with both intervals; seeds in which it is above, at, below 0."""

    interval: Interval
    bootstrap_low: float | None
    bootstrap_high: float | None
    higher: int
    equal: int
    lower: int

    @property
    def words(self) -> str:
        """The verdict that the t interval allows: one of VERDICTS, or why there is none."""
        n, low, high = self.interval.n, self.interval.low, self.interval.high
        if low is None or high is None:
            return "one seed: nothing to say"
        if low == high == 0:
            return "equal in all seeds"
        if n < FEWEST_SEEDS:
            return f"{n} seeds: too few to say"
        if high - low <= ROUNDING * abs(self.interval.mean):
            return "same in all seeds: no spread to go by"
        if low <= 0 <= high:
            return "no difference seen"
        return "higher" if low > 0 else "lower"


def central_mass(t: float, degrees: int) -> float:
    """P(|T| ≤ t) of Student's distribution with whole degrees of freedom.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    # The terms cos^j · (products of even over odd numbers, or the other way round), up to cos^(degrees - 2).
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| ≤ t) = level, by bisection. Raises ValueError below one degree of freedom."""
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while central_mass(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if central_mass(middle, degrees) < level else (low, middle)
    return high


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Mean and 95 % t interval over seeds; None of no value."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(1, mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return Interval(n, mean, mean - half, mean + half)


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, by drawing values with replacement. Same values, same interval."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values, dtype=np.float64), size=(resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """The differences `values` - `reference` over the seeds that both have; None where they share none."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    interval = mean_interval(differences)
    if interval is None:
        return None
    low, high = bootstrap(differences) if len(differences) > 1 else (None, None)
    return Paired(
        interval,
        low,
        high,
        higher=sum(value > 0 for value in differences),
        equal=sum(value == 0 for value in differences),
        lower=sum(value < 0 for value in differences),
    )
