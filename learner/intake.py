"""Reads trajectories from the stream and the rollouts' hashes, and forms batches in the order of arrival; with rewards,
of those whose groups are decided (`learner.groups`).

A trajectory stays pending after it is read, until a checkpoint on disk covers it or it is dropped, so that a new
learner finds it again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common import tracing
from common.groups import REWARDS
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import (
    ChunkSupport,
    ChunkTokens,
    Floats,
    Ints,
    MessageError,
    RolloutHead,
    ScoreSupport,
    ScoreView,
    Verdict,
    read_rid,
    read_support,
)
from common.wire.plane import Plane, shown
from common.wire.record import scores_field, support_field, tokens_field, view_field
from common.wire.scripts import Ending
from learner.batch import Trajectory
from learner.drift import repetition
from learner.groups import Groups

log = logging.getLogger("katana.intake")


@dataclass(frozen=True, slots=True)
class Received:
    """A trajectory and its entry in the stream."""

    entry: bytes
    trajectory: Trajectory


class Intake:
    """Reads `trajectories`; drops those that are stale when they would be used."""

    def __init__(
        self,
        plane: Plane,
        lease: Lease,
        *,
        max_staleness: int,
        vocab_size: int,
        entropies: bool = False,
        groups: Groups | None = None,
    ) -> None:
        """`entropies`: whether the trajectories' entropies are read. `groups`: for a run with rewards."""
        self._plane, self._lease, self._groups = plane, lease, groups
        self._max_staleness, self._vocab_size, self._entropies = max_staleness, vocab_size, entropies
        self._waiting: deque[Received] = deque()
        self._held: set[bytes] = set()  # entries that are read and not acknowledged
        self._known: set[str] = set()  # their rollouts
        self._covered: frozenset[str] = frozenset()
        self._lacked = False  # there was no batch: without a look at the stream and a wait there is none now
        self.dropped: dict[str, int] = {"treated": 0, "control": 0}

    def recover(self, consumed: Iterable[str]) -> None:
        """Take over what an earlier learner was given. What its checkpoint covers is acknowledged when it is read."""
        self._covered = frozenset(consumed)
        self._receive(self._lease.adopt("trajectories", "learner"))

    def batch(self, size: int, version: int, block_s: float) -> list[Received] | None:
        """The next `size` usable trajectories, or None if there are not enough yet."""
        if self._lease.adoption_due:
            self._receive(self._lease.adopt("trajectories", "learner"))
        self._drop_stale(version)
        batch = None if self._lacked else self._take(size, version)
        if batch is None:
            came = self._plane.read("learner", self._lease.token, ["trajectories"], count=2 * size, block_s=block_s)
            self._receive([entry for _, entry in came])
            self._drop_stale(version)
            batch = self._take(size, version)
        self._lacked = batch is None
        return batch

    def _take(self, size: int, version: int) -> list[Received] | None:
        if len(self._waiting) < size:
            return None
        if self._groups is None:
            return [self._waiting.popleft() for _ in range(size)]
        waiting = list(self._waiting)
        oldest = version - self._max_staleness  # one that is so old is stale in the next version
        rids = [one.trajectory.rid for one in waiting]
        places = self._groups.choose(rids, size, lambda place: waiting[place].trajectory.oldest_version <= oldest)
        if places is None:
            return None
        taken = set(places)
        self._waiting = deque(one for place, one in enumerate(waiting) if place not in taken)
        return [self._rewarded(waiting[place], self._groups) for place in places]

    def _rewarded(self, one: Received, groups: Groups) -> Received:
        rid = one.trajectory.rid
        outcome = groups.outcome(rid)
        trajectory = replace(
            one.trajectory,
            advantage=outcome.advantages.get(rid, 0.0),
            reward=REWARDS.get(outcome.standings.get(rid, "")),
            without_reward=outcome.without(rid),
        )
        return replace(one, trajectory=trajectory)

    def put_back(self, batch: list[Received]) -> None:
        """Put these at the start of the next batch."""
        self._waiting.extendleft(reversed(batch))

    def set_aside(self, one: Received, reason: str) -> None:
        """Give up a trajectory that cannot be trained on: it is dead, with its reason as a dead letter."""
        rid = one.trajectory.rid
        log.warning("trajectory %s is set aside: %s", rid, reason)
        self._plane.fail(rid, "learner", reason, max_attempts=1, shown=shown({b"rid": rid.encode()}))
        self.settle([Ending(one.entry, rid, "dead", "learner")])

    def settle(self, endings: list[Ending]) -> None:
        """Acknowledge trajectories and send their endings: they are not delivered again."""
        for some in self._plane.by_server(endings, lambda ending: ending.rid):
            for begin in range(0, len(some), 64):
                self._lease.call(scripts.settle(some[begin : begin + 64]))
        self._held.difference_update(ending.entry for ending in endings)
        self._known.difference_update(ending.rid for ending in endings)

    def _drop_stale(self, version: int) -> None:
        stale = [one for one in self._waiting if version - one.trajectory.oldest_version > self._max_staleness]
        if not stale:
            return
        self._waiting = deque(
            one for one in self._waiting if version - one.trajectory.oldest_version <= self._max_staleness
        )
        for one in stale:
            self.dropped[one.trajectory.arm] += 1
        self.settle(
            [
                Ending(one.entry, one.trajectory.rid, "dropped", "stale", version - one.trajectory.oldest_version)
                for one in stale
            ]
        )

    def _receive(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        if entries:
            with tracing.span("reading trajectories", entries=len(entries)):
                self._read_in(entries)

    def _read_in(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> None:
        fresh = [(entry, rid) for entry, values in entries if (rid := self._fresh(entry, values))]
        for (entry, rid), record in zip(fresh, self._plane.rollouts([rid for _, rid in fresh]), strict=True):
            self._held.add(entry)
            try:
                self._take_in(entry, rid, record)
            except MessageError as error:
                self._give_up(rid, str(error), entry)

    def _fresh(self, entry: bytes, values: dict[bytes, bytes]) -> str:
        """The rollout that a notice names; '' if there is nothing left to do for it."""
        try:
            rid = read_rid(values.get(b"rid"))
        except MessageError as error:
            self._refuse(entry, str(error), shown(values))
            return ""
        if entry in self._held:
            return ""  # a consumer group that was recreated delivers again what we already hold
        if rid in self._covered:
            self.settle([Ending(entry, rid, "trained")])
            return ""
        return rid

    def _take_in(self, entry: bytes, rid: str, record: dict[bytes, bytes]) -> None:
        """Raises MessageError for a record that cannot be read."""
        wrong = self._refusal(rid, record)
        if wrong:
            self._refuse(entry, wrong, rid.encode())
            return
        trajectory = read_trajectory(record, self._vocab_size, entropies=self._entropies)
        if trajectory.rid != rid:
            raise MessageError(f"it holds the record of {trajectory.rid!r:.40}")
        self._waiting.append(Received(entry, trajectory))
        self._known.add(rid)

    def _refusal(self, rid: str, record: dict[bytes, bytes]) -> str:
        """Why a notice has no trajectory to train on; '' if it has one."""
        if not record:
            return "its rollout is gone"
        if rid in self._known or b"settled" in record:
            return "a second notice of the same rollout"
        return "" if record.get(b"verdict", b"dead") != b"dead" else "its rollout has no verdict"

    def _refuse(self, entry: bytes, reason: str, what: bytes) -> None:
        """Acknowledge a notice without a trajectory; this ends no rollout."""
        log.warning("a notice in `trajectories` is removed: %s", reason)
        at = ("trajectories", "learner", entry)
        self._plane.fail("", "trajectories", reason, max_attempts=1, shown=what, at=at)

    def _give_up(self, rid: str, reason: str, entry: bytes) -> None:
        """End a rollout as dead. The script `fail` cannot do so after the verdict, so its ending states the reason."""
        log.warning("trajectory %s cannot be read: %s", rid, reason)
        self._plane.fail(rid, "trajectories", reason, max_attempts=1, shown=shown({b"rid": rid.encode()}))
        self.settle([Ending(entry, rid, "dead", "trajectories")])


def read_trajectory(record: dict[bytes, bytes], vocab_size: int, *, entropies: bool = False) -> Trajectory:
    """The kept part of a rollout's hash, with its entropies if they are wanted. Raises MessageError if the record does
    not match its verdict."""
    head = RolloutHead.decode(record.get(b"head", b""))
    verdict = Verdict.decode(record.get(b"verdict", b""))
    chunks: list[ChunkTokens] = []
    supports: list[ChunkSupport] = []
    teachers: list[ScoreSupport] = []
    read = 0

    def part(name: str) -> bytes:
        return record.get(name.encode(), b"")

    while read < verdict.train:
        seq = len(chunks)
        chunk = ChunkTokens.decode(part(tokens_field(seq)))
        support = read_support(part(support_field(seq)))
        teacher = ScoreSupport.decode(part(scores_field(seq)))
        if not len(chunk.tokens) == len(support.support_ids) == len(teacher.sampled_logprobs) or chunk.start != read:
            raise MessageError(f"chunk {seq}: its parts do not match")
        chunks.append(chunk)
        supports.append(support)
        teachers.append(teacher)
        read += len(chunk.tokens)
    keep = verdict.train
    tails = [teacher.tail_logprobs for teacher in teachers]
    if len({tail is None for tail in tails}) > 1:
        raise MessageError("some chunks have a tail and some have none")
    if len({teacher.own_ids is None for teacher in teachers}) > 1:
        raise MessageError("some chunks have outcomes of the teacher's own and some have none")
    try:
        ids = np.concatenate([_ids(*pair) for pair in zip(supports, teachers, strict=True)])[:keep]
        tokens = np.concatenate([chunk.tokens for chunk in chunks])[:keep]
        if max(tokens.max(), ids.max(initial=0), head.prompt.max()) >= vocab_size:
            raise MessageError(f"a token id is outside the vocabulary of {vocab_size}")
        return Trajectory(
            rid=head.rid,
            arm=head.arm,
            prompt=head.prompt,
            tokens=tokens,
            support_ids=ids,
            teacher_logprobs=np.concatenate([_logprobs(teacher) for teacher in teachers])[:keep],
            teacher_tail=(
                None if tails[0] is None else np.concatenate([tail for tail in tails if tail is not None])[:keep]
            ),
            teacher_sampled=np.concatenate([teacher.sampled_logprobs for teacher in teachers])[:keep],
            rollout_logprobs=np.concatenate([support.rollout_logprobs for support in supports])[:keep],
            sampling_logprobs=np.concatenate([support.sampled_logprobs for support in supports])[:keep],
            oldest_version=min(chunk.policy_version for chunk in chunks),
            # Not the writer's count: its overshoot depends on timing, and training must not.
            generated=verdict.trigger if verdict.stopped else len(verdict.tokens),
            finish_reason=verdict.finish_reason,
            fired=verdict.fired,
            threshold=verdict.threshold,
            repetition=repetition(verdict.tokens, vocab_size),
            entropy=_entropies(record, chunks)[:keep] if entropies else None,
        )
    except ValueError as error:
        raise MessageError(str(error)) from error


def _ids(support: ChunkSupport, teacher: ScoreSupport) -> Ints:
    """The support of the loss in a chunk: the student's outcomes, then those that the teacher added."""
    if teacher.own_ids is None:
        return support.support_ids
    return np.concatenate([support.support_ids, teacher.own_ids], axis=1)


def _logprobs(teacher: ScoreSupport) -> Floats:
    """The teacher's log-probabilities of STOP and of `_ids`."""
    if teacher.own_logprobs is None:
        return teacher.teacher_logprobs
    return np.concatenate([teacher.teacher_logprobs, teacher.own_logprobs], axis=1)


def _entropies(record: dict[bytes, bytes], chunks: Sequence[ChunkTokens]) -> Floats:
    """The student's entropies in these chunks, float32. Raises MessageError."""
    found = []
    for seq, chunk in enumerate(chunks):
        entropy = ScoreView.decode(record.get(view_field(seq).encode(), b"")).entropy
        if len(entropy) != len(chunk.tokens):
            raise MessageError(f"chunk {seq}: {len(entropy)} entropies of {len(chunk.tokens)} tokens")
        found.append(entropy)
    return np.concatenate(found)
