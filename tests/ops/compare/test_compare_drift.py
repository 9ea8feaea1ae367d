"""Drift guards of a comparison's cells: early and late by hand, and their course over steps."""

from __future__ import annotations

from typing import Any

import pytest

from ops.compare.drift import GUARDS, GuardPoint, course, cut_something, early_and_late, judged


def step(number: int, **guards: float | None) -> dict[str, Any]:
    return {"step": number, **guards}


def test_early_and_late_are_means_over_thirds_of_the_judged_steps() -> None:
    waiting = [step(number, threshold=None, cut_rate_treated=0.0) for number in (1, 2, 3)]
    active = [step(4 + n, threshold=0.5 - 0.1 * n, cut_rate_treated=0.1 * n) for n in range(5)]
    found = early_and_late(judged([*active, *waiting], "kat"))
    assert (found["threshold_early"], found["threshold_late"]) == (0.5, pytest.approx(0.1))
    assert (found["cut_rate_treated_early"], found["cut_rate_treated_late"]) == (0.0, pytest.approx(0.4))
    assert found["entropy_early"] is None


@pytest.mark.parametrize(("policy", "count"), [("none", 7), ("fixed", 7), ("random", 7), ("my:Own", 7)])
def test_a_policy_that_needs_no_number_is_judged_in_all_steps(policy: str, count: int) -> None:
    lines = [step(n, threshold=None, repetition=n / 10) for n in range(1, 8)]
    steps = judged(lines, policy)
    assert len(steps) == count
    found = early_and_late(steps)
    assert (found["repetition_early"], found["repetition_late"]) == (pytest.approx(0.15), pytest.approx(0.65))


@pytest.mark.parametrize("policy", ["kat", "kat_absolute", "kat_inverse", "random_matched"])
def test_a_policy_that_never_had_its_number_has_no_figures(policy: str) -> None:
    steps = judged([step(n, threshold=None, cut_rate_treated=0.0) for n in range(1, 8)], policy)
    assert set(early_and_late(steps).values()) == {None}


def test_only_the_guards_are_kept() -> None:
    assert judged([step(3, loss=1.0, entropy=0.5)], "none") == [dict.fromkeys(GUARDS) | {"step": 3, "entropy": 0.5}]


def test_an_arm_that_a_batch_does_not_have_is_left_out_of_its_mean() -> None:
    rates = [None, 0.5, 0.25, None, 0.75, None]
    found = early_and_late(judged([step(n + 1, cut_rate_control=rate) for n, rate in enumerate(rates)], "fixed"))
    assert (found["cut_rate_control_early"], found["cut_rate_control_late"]) == (0.5, 0.75)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_steps_have_no_early_and_late(count: int) -> None:
    found = early_and_late(judged([step(n + 1, entropy=1.0) for n in range(count)], "none"))
    assert set(found.values()) == {None} and len(found) == 2 * len(GUARDS)


def test_the_course_is_the_mean_of_the_cells_where_all_have_steps() -> None:
    one = judged([step(n, entropy=1.0) for n in range(1, 25)], "none")
    other = judged([step(n, entropy=3.0) for n in range(5, 13)], "none")  # began later, ended earlier
    points = course([one, other], "entropy", bins=12)
    assert points == [GuardPoint(5.5, 2.0), GuardPoint(7.5, 2.0), GuardPoint(9.5, 2.0), GuardPoint(11.5, 2.0)]
    assert len(course([one], "entropy", bins=12)) == 12
    assert course([one], "repetition") == [] and course([], "entropy") == []


def test_a_cell_counts_once_however_many_steps_it_has_in_a_stretch() -> None:
    often = judged([step(n, entropy=1.0) for n in range(1, 5)], "none")
    once = judged([step(2, entropy=3.0)], "none")
    assert course([often, once], "entropy", bins=1) == [GuardPoint(2.5, 2.0)]


def test_a_policy_that_cut_early_alone_has_cut_something() -> None:
    cut = judged([step(1, cut_rate_treated=0.5), step(2, cut_rate_treated=0.0)], "fixed")
    assert cut_something([cut])
    assert not cut_something([judged([step(1, cut_rate_treated=0.0), step(2)], "fixed")])
