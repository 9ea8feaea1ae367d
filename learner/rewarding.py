"""Figures of a batch's rewards, for metrics.jsonl and Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common import metrics
from common.groups import NO_MEMBER, OWN_REASONS, group_of
from common.runfiles.records import StepRewards
from learner.batch import Trajectory


def rewards_in(batch: Sequence[Trajectory], generations: int) -> StepRewards:
    """`generations`: rollouts of a group. A group that is in several batches counts in each."""
    rewards = [one.reward for one in batch if one.reward is not None]
    signal: dict[int, bool] = {}
    without: dict[int, str] = {}
    sent_back = 0
    for one in batch:
        group = group_of(one.rid, generations)
        if not one.without_reward:
            signal[group] = signal.get(group, False) or one.advantage != 0
        elif one.without_reward == NO_MEMBER:
            sent_back += 1
        elif one.without_reward not in OWN_REASONS:
            without[group] = one.without_reward
    reasons = Counter(without.values())
    if sent_back:
        reasons[NO_MEMBER] = sent_back
    return StepRewards(
        mean=sum(rewards) / len(rewards) if rewards else None,
        signal=sum(signal.values()) / len(signal) if signal else None,
        without=dict(sorted(reasons.items())),
    )


def show_rewards(seen: StepRewards) -> None:
    """Set the gauges; a figure that this batch does not have keeps its last value."""
    if seen.mean is not None:
        metrics.reward_mean.set(seen.mean)
    if seen.signal is not None:
        metrics.reward_signal.set(seen.signal)
    for reason, groups in seen.without.items():
        metrics.groups_without_reward.labels(reason).inc(groups)
