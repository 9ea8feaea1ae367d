"""What the learner knows of the groups of waiting trajectories, and which of these make the next batch.

A trajectory is *decided* once every admitted member of its group has a standing (`common.groups`), which the feeder
stores. A batch waits until enough are decided, and for nothing else: rollouts end by themselves, and members that are
not admitted yet may need the step that would wait for them. What the learner decides by itself it stores before the
step (`forgo`); all else is a function of standings that never change. So a learner that takes over comes to the same
advantages, without anything in its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from common.config import Config
from common.groups import ENDED_WITHOUT, GroupOutcome, RewardMode, group_of, members_of, outcome_of
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.plane import Plane, Rewarded

LAST_CHANCE, COMPLETE, LACKING, AWAITING = range(4)
"""In which order waiting trajectories make a batch."""


class Groups:
    """For a run with `reward.mode`."""

    def __init__(self, plane: Plane, lease: Lease, mode: RewardMode, size: int) -> None:
        """`size`: of a group, in rollouts."""
        self._plane, self._lease, self._mode, self._size = plane, lease, mode, size
        self._outcomes: dict[int, GroupOutcome] = {}  # of the groups of waiting trajectories
        self._lacking: set[int] = set()  # those that lack only members which are not admitted

    @classmethod
    def of(cls, config: Config, plane: Plane, lease: Lease) -> Groups | None:
        mode = config.reward.mode
        return None if mode == "none" else cls(plane, lease, mode, config.data.num_generations)

    def choose(self, rids: Sequence[str], size: int, last_chance: Callable[[int], bool]) -> list[int] | None:
        """The places of `size` of the waiting trajectories, rising; None while too few are decided.

        First those that would be too old for the batch after (`last_chance` of a place), decided or not; then those
        whose groups are complete; then those whose groups lack members that are not admitted. Whoever is chosen has an
        outcome.
        """
        groups = [group_of(rid, self._size) for rid in rids]
        self._look(set(groups))
        ranks = [self._rank(group) for group in groups]
        if sum(rank != AWAITING for rank in ranks) < size:
            return None
        order = sorted(
            (LAST_CHANCE if last_chance(place) else rank, place)
            for place, rank in enumerate(ranks)
            if rank != AWAITING or last_chance(place)
        )
        chosen = sorted(place for _, place in order[:size])
        self._forgo({groups[place] for place in chosen})
        return chosen

    def outcome(self, rid: str) -> GroupOutcome:
        """Of the group of one that was chosen."""
        return self._outcomes[group_of(rid, self._size)]

    def _look(self, groups: set[int]) -> None:
        """Read what is stored of groups that have no outcome yet."""
        self._outcomes = {group: known for group, known in self._outcomes.items() if group in groups}
        self._lacking.clear()
        asked = sorted(groups - self._outcomes.keys())
        stored = iter(self._plane.rewarded([rid for group in asked for rid in members_of(group, self._size)]))
        for group in asked:
            self._note(group, {rid: next(stored) for rid in members_of(group, self._size)})

    def _note(self, group: int, found: Mapping[str, Rewarded]) -> None:
        standings = {rid: one.standing for rid, one in found.items() if one.standing is not None}
        forgone = next(iter(found.values())).forgone
        if forgone is not None:
            self._outcomes[group] = GroupOutcome(standings, reason=forgone)
        elif len(standings) == len(found) or any(one in ENDED_WITHOUT for one in standings.values()):
            self._outcomes[group] = outcome_of(self._mode, standings)
        elif not any(one.there for rid, one in found.items() if rid not in standings):
            self._lacking.add(group)

    def _rank(self, group: int) -> int:
        return COMPLETE if group in self._outcomes else LACKING if group in self._lacking else AWAITING

    def _forgo(self, groups: set[int]) -> None:
        """Store that those without an outcome are trained without reward."""
        firsts = {group: members_of(group, self._size)[0] for group in sorted(groups - self._outcomes.keys())}
        calls = [scripts.forgo(first, "split" if group in self._lacking else "late") for group, first in firsts.items()]
        for group, reason in zip(firsts, self._lease.call_all(calls), strict=True):
            self._outcomes[group] = GroupOutcome({}, reason=reason)
