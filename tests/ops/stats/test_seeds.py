"""Statistics over seeds, by hand and against printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ops.stats.seeds import Interval, bootstrap, central_mass, mean_interval, paired, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_printed_tables(degrees: int, printed: float) -> None:
    assert round(t_quantile(degrees), 3) == printed


def test_central_mass_by_hand() -> None:
    assert central_mass(1.0, 1) == pytest.approx(0.5)  # Cauchy: 2/π · atan 1
    assert central_mass(1.0, 2) == pytest.approx(1 / math.sqrt(3))  # t / √(2 + t²)
    assert central_mass(0.0, 7) == 0.0


def test_no_degree_of_freedom_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        t_quantile(0)


def test_mean_interval_by_hand() -> None:
    found = mean_interval([1.0, 2.0, 3.0])  # s = 1
    assert found is not None
    assert (found.n, found.mean) == (3, 2.0)
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert (found.low, found.high) == (pytest.approx(2 - 4.3027 / 3**0.5, rel=1e-3), found.mean + (found.half or 0))


def test_one_seed_has_no_interval_and_none_has_no_mean() -> None:
    assert mean_interval([0.25]) == Interval(1, 0.25, None, None)
    assert mean_interval([]) is None


def test_bootstrap_by_hand() -> None:
    # Of two values the mean is the lower one, the middle or the upper one: chances 1/4, 1/2, 1/4.
    assert bootstrap([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap([3.0, 3.0, 3.0]) == (3.0, 3.0)
    # Of 4 zeros and a 1: P(no 1) = 0.8⁵ = 0.33; P(more than 2) = 0.058, P(more than 3) = 0.0067, so 3 of 5.
    assert bootstrap([0.0, 0.0, 0.0, 0.0, 1.0]) == (0.0, 0.6)


def test_the_bootstrap_is_as_narrow_as_is_said() -> None:
    rng = np.random.default_rng(0)
    covered = {"bootstrap": 0, "t": 0}
    for _ in range(1000):
        values = rng.normal(size=5).tolist()
        low, high = bootstrap(values, resamples=400)
        covered["bootstrap"] += low <= 0 <= high
        interval = mean_interval(values)
        assert interval is not None and interval.low is not None and interval.high is not None
        covered["t"] += interval.low <= 0 <= interval.high
    assert 800 <= covered["bootstrap"] <= 870
    assert 935 <= covered["t"] <= 965


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    found = paired({0: 0.5, 1: 0.6, 2: 0.7, 9: 99.0}, {0: 0.4, 1: 0.6, 2: 0.8, 7: -99.0})
    assert found is not None
    assert (found.interval.n, found.higher, found.equal, found.lower) == (3, 1, 1, 1)
    assert found.interval.mean == pytest.approx(0.0)
    assert found.words == "no difference seen"
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.1, 0.11, 0.09], "higher"),
        ([-0.1, -0.11, -0.09], "lower"),
        ([0.1, 0.2, 0.0], "no difference seen"),  # s = 0.1, half = 0.248
        ([0.3], "one seed: nothing to say"),
        ([0.0, 0.0], "equal in all seeds"),
        ([2.0, 2.1], "2 seeds: too few to say"),  # s = 0.07, half = 0.635: the interval alone would say higher
        ([2.0, 2.0, 2.0], "same in all seeds: no spread to go by"),
        ([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6], "same in all seeds: no spread to go by"),  # but for rounding
    ],
)
def test_words_say_no_more_than_the_interval(differences: list[float], words: str) -> None:
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert found is not None
    assert found.words == words


def test_pairing_sees_what_the_seeds_hide() -> None:
    reference = {0: 0.2, 1: 0.5, 2: 0.8}  # seeds differ by 0.3, the two settings by 0.05
    found = paired({seed: value + 0.05 + 0.001 * seed for seed, value in reference.items()}, reference)
    assert found is not None and found.bootstrap_low is not None
    assert found.words == "higher"
    assert found.bootstrap_low == pytest.approx(0.05)
