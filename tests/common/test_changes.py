"""Change points by hand, and against slow references that look at whole streams, in any chunking."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.changes import Change, Cusum

eighths = st.integers(-40, 40).map(lambda number: number / 8)


def fed(rule: Cusum, values: list[float], sizes: list[int]) -> Change | None:
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
