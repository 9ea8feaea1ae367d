"""Drift guards of a comparison's cells: early and late by hand, and their course over steps."""

from __future__ import annotations

from typing import Any

import pytest

from ops.compare_drift import GUARDS, Point, course, early_and_late, judged


def step(number: int, **guards: float | None) -> dict[str, Any]:
    return {"step": number, **guards}


def test_early_and_late_are_means_over_thirds_of_the_judged_steps() -> None:
    waiting = [step(number, threshold=None, cut_rate_treated=0.0) for number in (1, 2, 3)]
    active = [step(4 + n, threshold=0.5 - 0.1 * n, cut_rate_treated=0.1 * n) for n in range(5)]
    found = early_and_late(waiting + active)
    assert (found["threshold_early"], found["threshold_late"]) == (0.5, pytest.approx(0.1))
    assert (found["cut_rate_treated_early"], found["cut_rate_treated_late"]) == (0.0, pytest.approx(0.4))
    assert found["entropy_early"] is None


def test_a_policy_without_a_threshold_is_judged_in_all_steps() -> None:
    lines = [step(n, threshold=None, repetition=n / 10) for n in range(1, 8)]
    assert judged(lines) == lines
    found = early_and_late(lines)
    assert (found["repetition_early"], found["repetition_late"]) == (pytest.approx(0.15), pytest.approx(0.65))


def test_an_arm_that_a_batch_does_not_have_is_left_out_of_its_mean() -> None:
    rates = [None, 0.5, 0.25, None, 0.75, None]
    found = early_and_late([step(n + 1, cut_rate_control=rate) for n, rate in enumerate(rates)])
    assert (found["cut_rate_control_early"], found["cut_rate_control_late"]) == (0.5, 0.75)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_steps_have_no_early_and_late(count: int) -> None:
    found = early_and_late([step(n + 1, entropy=1.0) for n in range(count)])
    assert set(found.values()) == {None} and len(found) == 2 * len(GUARDS)


def test_the_course_is_the_mean_of_the_seeds_in_stretches_of_steps() -> None:
    one = [step(n, threshold=1.0, entropy=float(n)) for n in range(1, 25)]
    other = [step(n, threshold=1.0, entropy=2.0 * n) for n in range(1, 13)]  # ended earlier
    points = course([one, other], "entropy", bins=12)
    assert len(points) == 12
    assert points[0] == Point(2, pytest.approx((1 + 2 + 2 + 4) / 4))
    assert points[-1] == Point(24, 23.5)
    assert course([one], "repetition") == [] and course([], "entropy") == []
