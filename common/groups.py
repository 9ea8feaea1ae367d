"""Groups: the rollouts of a prompt, and the advantages that a verifier's verdicts on them become. Pure functions.

The rollouts of a group have consecutive numbers: those of group g are g n … g n + n - 1, with n = data.num_generations.
One that an operator sent back has the next number and another group's prompt: it is in no group.

A member's *standing* is one of these words. The feeder decides it once, from the verdict or the ending, and it never
changes:

    right, wrong    what the verifier says: reward 1 or 0
    cut             its writing was stopped, and `reward.of_cut` is none: no reward
    unknown         the verifier gave no verdict: no reward
    sent_back       it has another prompt: not a member
    dead, lost      it ended without a verdict: nobody in the group is rewarded

Nobody in a group is rewarded either if fewer than two have a reward (`few`), or if the learner could not wait for it:
`split`, a batch was due before all its rollouts were admitted; `late`, the first of them would have become stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from common.rids import number_of, rid_of

RewardMode = Literal["grpo", "reinforce_leave_one_out"]
REWARDS = {"right": 1.0, "wrong": 0.0}
ENDED_WITHOUT = ("dead", "lost")
NO_MEMBER = "sent_back"
OWN_REASONS = ("cut", "unknown")
"""Why a member has no reward whose group may have."""
STANDINGS = frozenset({*REWARDS, *OWN_REASONS, NO_MEMBER, *ENDED_WITHOUT})
FORGONE = ("split", "late")
"""Why the learner decides by itself that nobody in a group is rewarded."""


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """What became of a group. `advantages`: by member, of those that have a reward; empty if nobody is rewarded, and
    then `reason` says why. `standings`: of all that are known."""

    standings: Mapping[str, str]
    advantages: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def without(self, rid: str) -> str:
        """Why a member is trained without reward; '' if it is not."""
        standing = self.standings.get(rid, "unknown")
        if standing == NO_MEMBER or (not self.reason and rid not in self.advantages):
            return standing
        return self.reason


def group_of(rid: str, size: int) -> int:
    """The group that a rollout's number belongs to, of groups of `size`."""
    return number_of(rid) // size


def members_of(group: int, size: int) -> list[str]:
    """The rollouts whose numbers belong to a group."""
    return [rid_of(number) for number in range(group * size, (group + 1) * size)]


def outcome_of(mode: RewardMode, standings: Mapping[str, str]) -> GroupOutcome:
    """The outcome of a group whose members' standings are all known, or of which one ended without a verdict."""
    for standing in standings.values():
        if standing in ENDED_WITHOUT:
            return GroupOutcome(standings, reason=standing)
    rewards = {rid: REWARDS[standing] for rid, standing in standings.items() if standing in REWARDS}
    if len(rewards) < 2:
        return GroupOutcome(standings, reason="few")
    found = advantages(mode, list(rewards.values()))
    return GroupOutcome(standings, dict(zip(rewards, found, strict=True)))


def advantages(mode: RewardMode, rewards: Sequence[float]) -> list[float]:
    """The advantage of each of n >= 2 rewards over its group.

    grpo: (r - mean) / std, of DeepSeekMath (arXiv 2402.03300, section 4.1.2). The paper does not say which standard
        deviation; this is the sample's, with n - 1, as in TRL and verl. If it is 0, all advantages are 0.
    reinforce_leave_one_out: r - mean of the others (arXiv 2402.14740).

    Raises ValueError for fewer than two.
    """
    n = len(rewards)
    if n < 2:
        raise ValueError(f"{n} rewards, expected at least 2")
    total = sum(rewards)
    if mode == "reinforce_leave_one_out":
        return [reward - (total - reward) / (n - 1) for reward in rewards]
    mean = total / n
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / (n - 1)) ** 0.5
    return [(reward - mean) / deviation if deviation else 0.0 for reward in rewards]
