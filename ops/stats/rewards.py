"""The rewards of a run in figures, from what its steps trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from common.groups import NO_MEMBER, OWN_REASONS, group_of
from common.runfiles.records import BookLine, RewardTotals, Trained
from common.runfiles.run import RunFolder


def reward_totals(steps: Iterable[Trained], lines: Iterable[BookLine], generations: int) -> RewardTotals:
    """Each group once, whatever number of steps it is in. `generations`: rollouts of a group; `lines`: the books, for
    the mean reward of all rollouts that have one."""
    signal: dict[int, bool] = {}
    without: dict[int, str] = {}
    sent_back = 0
    for step in steps:
        for rid, advantage, reason in zip(step.rids, step.advantages, step.without_reward, strict=False):
            group = group_of(rid, generations)
            if not reason:
                signal[group] = signal.get(group, False) or advantage != 0
            elif reason == NO_MEMBER:
                sent_back += 1
            elif reason not in OWN_REASONS:
                without[group] = reason
    standings = Counter(line.reward for line in lines)
    judged = standings["right"] + standings["wrong"]
    return RewardTotals(
        mean=standings["right"] / judged if judged else None,
        groups=len(signal),
        with_signal=sum(signal.values()),
        without=dict(sorted(Counter(without.values()).items())),
        sent_back=sent_back,
    )


def rewards_of(run: RunFolder, lines: Sequence[BookLine]) -> RewardTotals | None:
    """Of a run's folder with these books; None for a run without rewards."""
    steps = [step for step in run.trained() if step.advantages]
    return reward_totals(steps, lines, run.config.data.num_generations) if steps else None


def words(totals: RewardTotals) -> str:
    """In a line."""
    mean = "none" if totals.mean is None else f"{totals.mean:.3f}"
    groups = f"{totals.groups} groups rewarded, {totals.with_signal} of them with rewards that differ"
    reasons = ", ".join(f"{reason} {count}" for reason, count in totals.without.items())
    left = f"; {sum(totals.without.values())} without reward ({reasons})" if reasons else ""
    back = f"; {totals.sent_back} rollouts sent back, in no group" if totals.sent_back else ""
    return f"mean reward {mean}; {groups}{left}{back}"
