"""Change points by hand, and against slow references that look at whole streams, in any chunking."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.changes import AdaptiveWindow, Change, Cusum

eighths = st.integers(-40, 40).map(lambda number: number / 8)


def fed(rule: Cusum | AdaptiveWindow, values: list[float], sizes: list[int]) -> Change | None:
    place = 0
    for size in [*sizes, len(values)]:
        found = rule.feed(np.array(values[place : place + size], np.float64))
        place += size
        if found is not None:
            assert rule.feed(np.full(50, -9.0)) is None and rule.feed(np.full(50, 9.0)) is None  # once
            return found
    return None


# --- Page's cumulative sum ---


def page(values: list[float], grace: int, reference: int, drift: float, threshold: float, rise: bool) -> Change | None:
    """By definition: S_t is the greatest sum of what ends at t, or 0; the change is after the last t with S_t = 0."""
    limit = Fraction(threshold) / 2
    cut = [min(max(Fraction(-one if rise else one), -limit), limit) for one in values]
    begin = grace + reference
    mean = sum(cut[grace:begin], Fraction(0)) / reference
    last_zero = begin
    for t in range(begin + 1, len(cut) + 1):
        tails = [sum((mean - one - Fraction(drift) for one in cut[s:t]), Fraction(0)) for s in range(begin, t)]
        if max(tails) <= 0:
            last_zero = t
        elif max(tails) > Fraction(threshold):
            return Change(t, last_zero)
    return None


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_cumulative_sum_is_pages_in_any_chunking(data: st.DataObject) -> None:
    low = data.draw(st.lists(eighths, max_size=20))
    values = data.draw(st.lists(eighths, max_size=20)) + [one - data.draw(st.sampled_from([-1, 1])) for one in low]
    how = {
        "grace": data.draw(st.integers(0, 3)),
        "reference": data.draw(st.sampled_from([1, 2, 4, 8])),  # so that the mean is exact
        "drift": data.draw(st.integers(0, 8)) / 8,
        "threshold": data.draw(st.integers(1, 40)) / 4,
        "rise": data.draw(st.booleans()),
    }
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=20))
    wanted = page(values, **how)
    assert fed(Cusum(**how), values, sizes) == wanted
    if wanted is not None:
        assert how["grace"] + how["reference"] <= wanted.before <= wanted.seen - 2  # no single number is a change


def test_the_cumulative_sum_by_hand() -> None:
    # μ is 1 after two. S is 0 after the third, then 1.5, 0.5, 2, 3.5, and 5, which is above 4, after the eighth.
    values = [0.0, 2.0, 1.0, -1.0, 1.5, -1.0, -1.0, -1.0]
    rule = {"grace": 0, "reference": 2, "drift": 0.5, "threshold": 4.0}
    assert fed(Cusum(**rule), values, []) == Change(8, 3)
    assert fed(Cusum(**rule, rise=True), [-one for one in values], [3, 1]) == Change(8, 3)
    assert fed(Cusum(**rule, rise=True), values, []) is None
    assert fed(Cusum(**rule), values[:7], []) is None
    assert fed(Cusum(**rule), [0.0, 0.0, -1e4, 0.0, 0.0], []) is None  # counts as -2, once
    assert fed(Cusum(**{**rule, "threshold": None}), values, []) is None
    assert fed(Cusum(**{**rule, "grace": 3}), [9.0, -9.0, 9.0, *values], []) == Change(11, 6)


@pytest.mark.parametrize(
    "wrong", [{"grace": -1}, {"reference": 0}, {"drift": -0.5}, {"threshold": 0.0}], ids=lambda wrong: next(iter(wrong))
)
def test_a_cumulative_sum_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Cusum(**{"grace": 0, "reference": 2, "drift": 0.5, "threshold": 4.0} | wrong)


# --- adaptive windows ---


def adwin(
    values: list[float], grace: int, block: int, most_blocks: int, top: float, delta: float
) -> tuple[Change | None, float]:
    """By definition, over single numbers; and how near a decision was to going the other way."""
    read = [min(max(one, 0.0), top) for one in values[grace:]]
    begin, doubt = 0, math.inf
    for end in range(block, len(read) + 1, block):
        begin = max(begin, end - most_blocks * block)
        while end - begin > block:
            window = read[begin:end]
            n, mean = len(window), statistics.fmean(window)
            variance = statistics.fmean([one * one for one in window]) - mean * mean
            ranked = []
            for n0 in range(block, n, block):
                older, newer = statistics.fmean(window[:n0]), statistics.fmean(window[n0:])
                m = n0 * (n - n0) / n
                log = math.log(2 * n / delta)
                bound = math.sqrt(max(0.0, 2 / m * variance * log)) + 2 * top * log / (3 * m)
                ranked.append((abs(older - newer) - bound, n0, older > newer))
            ranked.sort(key=lambda one: -one[0])
            excess, n0, fell = ranked[0]
            doubt = min(doubt, abs(excess), *(excess - one[0] for one in ranked[1:2] if excess > -1e-9))
            if excess <= 0:
                break
            if fell:
                return Change(grace + end, grace + begin + n0), doubt
            begin += n0
    return None, doubt


levels = st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0])
stretches = st.lists(st.tuples(levels, st.integers(1, 60)), max_size=5)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_adaptive_windows_are_those_of_the_definition_in_any_chunking(data: st.DataObject) -> None:
    spoilt = data.draw(st.integers(0, 2**32 - 1))
    values = [level for level, count in data.draw(stretches) for _ in range(count)]
    values = (np.array(values) * np.random.default_rng(spoilt).uniform(0.8, 1.2, len(values))).tolist()
    how = {
        "grace": data.draw(st.integers(0, 9)),
        "block": data.draw(st.integers(1, 9)),
        "most_blocks": data.draw(st.sampled_from([2, 5, 40])),
        "top": data.draw(st.sampled_from([0.25, 1.0, 2.0])),
        "delta": data.draw(st.sampled_from([0.01, 0.5, 0.9])),
    }
    sizes = data.draw(st.lists(st.integers(0, 50), max_size=20))
    wanted, doubt = adwin(values, **how)
    assume(doubt > 1e-9)
    assert fed(AdaptiveWindow(**how), values, sizes) == wanted
    if wanted is not None:
        assert how["grace"] + how["block"] <= wanted.before <= wanted.seen - how["block"]


def test_adaptive_windows_find_a_fall_where_it_is_forget_a_rise_and_are_not_fooled() -> None:
    rng = np.random.default_rng(3)
    rule = {"grace": 8, "block": 8, "most_blocks": 128, "top": 1.0, "delta": 0.05}
    alive, dead = rng.gamma(0.5, 1.0, 2048), rng.gamma(0.5, 0.02, 512)
    assert fed(AdaptiveWindow(**rule), alive.tolist(), []) is None
    found = fed(AdaptiveWindow(**rule), [*alive[:128], *dead], [])
    assert found is not None and abs(found.before - 128) <= 8 and found.seen < 256
    # Low, high, low: the rise makes it forget the low part, so that the fall is one from the high part alone.
    again = fed(AdaptiveWindow(**rule), [*dead[:256], *alive[:128], *dead], [])
    assert again is not None and abs(again.before - 384) <= 8
    assert fed(AdaptiveWindow(**rule), [*dead, *alive], []) is None
    assert fed(AdaptiveWindow(**{**rule, "delta": None}), [*alive[:128], *dead], []) is None


@pytest.mark.parametrize(
    "wrong",
    [{"grace": -1}, {"block": 0}, {"most_blocks": 1}, {"top": 0.0}, {"delta": 1.0}],
    ids=lambda one: next(iter(one)),
)
def test_adaptive_windows_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        AdaptiveWindow(**{"grace": 0, "block": 8, "most_blocks": 128, "top": 1.0, "delta": 0.05} | wrong)
