"""The bootstrap by prompt: its mean and width, prompts that stay whole, blocks that change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from ops.stats import intervals as bootstrap
from ops.stats.intervals import interval, resampled_sums


def test_sums_are_right_on_average_and_as_wide_as_they_should_be() -> None:
    values = np.arange(400.0)
    sums = resampled_sums(range(400), np.column_stack([values, np.ones(400)]), resamples=4000)
    assert sums.shape == (4000, 2)
    assert (sums[:, 1] == 400).all()
    assert sums[:, 0].mean() == pytest.approx(values.sum(), rel=0.01)
    assert sums[:, 0].std() == pytest.approx(values.std() * 20, rel=0.05)


def test_rollouts_of_a_prompt_come_together() -> None:
    columns = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [0.0, 5.0]])
    sums = resampled_sums([7, 7, 3, 3], columns)
    assert (sums[:, 0] == sums[:, 1]).all()
    assert set(sums[:, 0]) == {2.0, 6.0, 10.0}


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).normal(size=(300, 3))
    whole = resampled_sums(range(300), columns)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 1000)
    assert np.allclose(resampled_sums(range(300), columns), whole, rtol=1e-12)


def test_seeds_decide_the_draws() -> None:
    columns = np.arange(30.0)[:, None]
    assert (resampled_sums(range(30), columns, seed=1) == resampled_sums(range(30), columns, seed=1)).all()
    assert (resampled_sums(range(30), columns, seed=1) != resampled_sums(range(30), columns, seed=2)).any()


def test_the_interval_leaves_a_fortieth_on_each_side() -> None:
    assert interval(np.arange(1001.0)) == (25.0, 975.0)
