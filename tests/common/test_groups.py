"""Advantages against references that share no code with them, and what becomes of a group."""

from __future__ import annotations

import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.groups import STANDINGS, GroupOutcome, RewardMode, advantages, group_of, members_of, outcome_of

REWARDS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)
MODES: list[RewardMode] = ["grpo", "reinforce_leave_one_out"]


@given(REWARDS)
def test_grpo_is_the_standard_score_by_the_samples_deviation(rewards: list[float]) -> None:
    deviation = statistics.stdev(rewards)
    mean = statistics.fmean(rewards)
    expected = [(reward - mean) / deviation if deviation else 0.0 for reward in rewards]
    assert advantages("grpo", rewards) == pytest.approx(expected, abs=1e-12)


@given(REWARDS)
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(rewards: list[float]) -> None:
    expected = []
    for place, reward in enumerate(rewards):
        others = [Fraction(other) for at, other in enumerate(rewards) if at != place]
        expected.append(float(Fraction(reward) - sum(others) / len(others)))
    assert advantages("reinforce_leave_one_out", rewards) == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    # Three of four right: mean 3/4, deviation with n - 1 is 1/2.
    assert advantages("grpo", [1, 1, 1, 0]) == pytest.approx([0.5, 0.5, 0.5, -1.5])
    assert advantages("reinforce_leave_one_out", [1, 1, 1, 0]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1.0])
    assert advantages("grpo", [1, 0]) == pytest.approx([0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize("mode", MODES)
def test_equal_rewards_are_no_signal_to_the_last_bit(mode: RewardMode) -> None:
    for n in range(2, 65):
        assert set(advantages(mode, [1.0] * n)) | set(advantages(mode, [0.0] * n)) == {0.0}


@pytest.mark.parametrize("mode", MODES)
@given(rewards=REWARDS)
def test_they_sum_to_zero_and_have_the_sign_of_their_reward(mode: RewardMode, rewards: list[float]) -> None:
    found = np.array(advantages(mode, rewards))
    assert abs(found.sum()) < 1e-9
    if len(set(rewards)) > 1:
        assert ((found > 0) == (np.array(rewards) == 1)).all()


def test_one_reward_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match="1 rewards, expected at least 2"):
        advantages("grpo", [1.0])


def outcome(*standings: str) -> GroupOutcome:
    return outcome_of("reinforce_leave_one_out", dict(zip("abcd", standings, strict=False)))


def test_who_has_a_reward_is_compared_and_the_others_are_trained_without() -> None:
    found = outcome("right", "cut", "wrong", "sent_back")
    assert found.advantages == {"a": 1.0, "c": -1.0}
    assert [found.without(rid) for rid in "abcd"] == ["", "cut", "", "sent_back"]
    unknown = outcome("right", "unknown", "right")
    assert (unknown.advantages, unknown.without("b")) == ({"a": 0.0, "c": 0.0}, "unknown")


@pytest.mark.parametrize(
    ("standings", "reason"),
    [
        (("right", "dead", "wrong", "wrong"), "dead"),
        (("right", "wrong", "lost", "wrong"), "lost"),
        (("right", "cut", "cut", "unknown"), "few"),
        (("sent_back", "sent_back", "right", "sent_back"), "few"),
    ],
)
def test_nobody_in_a_group_that_is_not_whole_is_rewarded(standings: tuple[str, ...], reason: str) -> None:
    found = outcome(*standings)
    assert (found.advantages, found.reason) == ({}, reason)
    for rid, standing in zip("abcd", standings, strict=True):
        assert found.without(rid) == ("sent_back" if standing == "sent_back" else reason)
    assert set(standings) <= STANDINGS


def test_numbers_in_a_row_are_a_group() -> None:
    assert members_of(5, 4) == ["r000000020", "r000000021", "r000000022", "r000000023"]
    assert {group_of(rid, 4) for rid in members_of(5, 4)} == {5}
