"""The standings of rollouts in their groups: the feeder has each judged once, as soon as its verdict is known.

Invariant: every rollout that is booked while its group has unbooked members has a stored standing; so the learner,
which waits for the standings of a group, never waits for a rollout that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from actors.books import Booked
from actors.unbooked import Unbooked
from common.config import Config
from common.groups import NO_MEMBER, group_of, members_of
from common.rids import number_of
from common.runfiles.records import BookLine
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import Ints, MessageError, RolloutHead, Verdict
from common.wire.plane import Plane

_CORRECT = {"right": True, "wrong": False}
Judge = Callable[[int, Ints], bool | None]


class Rewards:
    """For a run with `reward.mode`. `booked`: the rollouts in the books."""

    def __init__(self, config: Config, plane: Plane, lease: Lease, judge: Judge, booked: Booked) -> None:
        self._of_cut, self._size = config.reward.of_cut, config.data.num_generations
        self._plane, self._lease, self._judge, self._booked = plane, lease, judge, booked

    def go_on(self, lines: Iterable[BookLine], open_rollouts: Iterable[str], next_number: int, end: int) -> None:
        """After a start: store the standings that a lost Redis, or an ended run that is resumed, no longer has, and
        remove those that a killed feeder left. `next_number`, `end`: the first number that was not admitted, and one
        above all that were."""
        numbers = [*map(number_of, open_rollouts), *range(next_number, end + 1)]
        groups = {number // self._size for number in numbers if number >= 0}
        booked = {line.rid: line.reward for line in lines if group_of(line.rid, self._size) in groups}
        self._lease.call_all([scripts.reward(rid, standing or "lost") for rid, standing in booked.items()])
        self.forget(self._plane.rewards_kept())

    def record(self, rollouts: Mapping[str, Unbooked], *, last: bool = False) -> None:
        """Have rollouts judged that have no standing yet, and store theirs. `last`: before they are booked, so that
        one without a verdict gets none any more."""
        found: dict[str, str] = {}
        for rid, rollout in rollouts.items():
            if rollout.reward is None and (standing := self._standing(rid, rollout, last)):
                found[rid] = standing
                self._lease.keep()  # judging a completion may take seconds
        stored = self._lease.call_all([scripts.reward(rid, standing) for rid, standing in found.items()])
        for rid, standing in zip(found, stored, strict=True):
            rollouts[rid].reward = standing
            if rollouts[rid].correct is not None:  # judged before, by a feeder that was killed: the books say the same
                rollouts[rid].correct = (_CORRECT.get(standing),)

    def forget(self, rids: Iterable[str]) -> None:
        """Remove the standings of groups whose members are all booked."""
        groups = {group_of(rid, self._size) for rid in rids}
        members = [members_of(group, self._size) for group in sorted(groups) if group >= 0]
        over = [rid for some in members if all(rid in self._booked for rid in some) for rid in some]
        self._lease.call_all([scripts.unreward(some) for some in self._plane.by_server(over, lambda rid: rid)])

    def _standing(self, rid: str, rollout: Unbooked, last: bool) -> str | None:
        if rollout.verdict is not None:
            return self._judged(rid, rollout, rollout.verdict)
        if rollout.ending is None or rollout.ending[1] == "run_end":
            return None
        if rollout.ending[0] == "dead":
            return NO_MEMBER if self._was_sent_back(rid) else "dead"
        return "lost" if last else None  # its verdict may be read shortly after the ending

    def _judged(self, rid: str, rollout: Unbooked, verdict: Verdict) -> str:
        if verdict.problem != group_of(rid, self._size):
            return NO_MEMBER
        if not verdict.stopped:
            right = self._judge(verdict.problem, verdict.tokens)
            rollout.correct = (right,)
        elif self._of_cut == "kept":
            right = self._judge(verdict.problem, verdict.tokens[: verdict.keep])
        else:
            return "cut" if self._of_cut == "none" else "wrong"
        return "unknown" if right is None else "right" if right else "wrong"

    def _was_sent_back(self, rid: str) -> bool:
        """Whether it has another group's prompt; False if its record is gone or broken."""
        [(head,)] = self._plane.fields([(rid, ["head"])])
        try:
            return head is not None and RolloutHead.decode(head).problem != group_of(rid, self._size)
        except MessageError:
            return False
