"""What the checker says of rewards: advantages that were trained on, recomputed from the standings in the books."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.config import Config
from common.groups import FORGONE, NO_MEMBER, STANDINGS, group_of, members_of, outcome_of
from common.runfiles.records import BookLine
from ops.chaos.records import Records

_CLOSE = 1e-9
_OF_CORRECT = {True: "right", False: "wrong", None: "unknown"}


@dataclass(frozen=True, slots=True)
class _Share:
    """What a step trained a rollout with."""

    step: int
    advantage: float
    without: str


def reward_faults(records: Records, excused: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Each rollout at fault, and why. `excused`: rollouts whose standings a lost Redis took."""
    config = records.config
    if config is None or config.reward.mode == "none":
        return
    size = config.data.num_generations
    for line in records.books.values():
        if line.rid not in excused and (detail := _standing_fault(line, config)):
            yield line.rid, detail
    shares: dict[int, dict[str, _Share]] = {}
    for step in records.trained:
        if len(step.advantages) != len(step.rids):
            yield "", f"step {step.step}: trained.jsonl has no advantages"
            continue
        for rid, advantage, without in zip(step.rids, step.advantages, step.without_reward, strict=True):
            shares.setdefault(group_of(rid, size), {})[rid] = _Share(step.step, advantage, without)
    for group, trained in shares.items():
        members = members_of(group, size)
        if not excused.intersection(members):
            yield from _group_faults(members, trained, records, config)


def _standing_fault(line: BookLine, config: Config) -> str:
    """What is wrong with the standing of a rollout; '' if nothing."""
    if not line.judged:
        return "" if line.reward in (None, "dead", "lost", NO_MEMBER) else f"{line.reward:.40}, without a verdict"
    if line.reward not in STANDINGS:
        return f"its standing is {line.reward!r:.40}"
    if line.problem != group_of(line.rid, config.data.num_generations):
        allowed: tuple[str, ...] = (NO_MEMBER,)
    elif not line.stopped:
        allowed = (_OF_CORRECT[line.correct],)
    else:
        of_cut = {"none": ("cut",), "as_wrong": ("wrong",), "kept": ("right", "wrong", "unknown")}
        allowed = of_cut[config.reward.of_cut]
    return "" if line.reward in allowed else f"its standing is {line.reward}, by its verdict {' or '.join(allowed)}"


def _group_faults(
    members: list[str], trained: dict[str, _Share], records: Records, config: Config
) -> Iterator[tuple[str, str]]:
    standings = {rid: line.reward for rid in members if (line := records.books.get(rid)) and line.reward is not None}
    forgone = {share.without for share in trained.values()} & set(FORGONE)
    assert config.reward.mode != "none"
    found = outcome_of(config.reward.mode, standings)
    known = len(standings) == len(members) or found.reason in ("dead", "lost")
    for rid, share in trained.items():
        if standings.get(rid) == NO_MEMBER:
            wanted, advantage = NO_MEMBER, 0.0
        elif forgone:
            wanted, advantage = min(forgone), 0.0
        elif not known:
            yield rid, f"step {share.step}: its group was decided, and not all of it have a standing"
            continue
        else:
            wanted, advantage = found.without(rid), found.advantages.get(rid, 0.0)
        if share.without != wanted:
            yield rid, f"step {share.step}: trained without reward as {share.without!r:.40}, by its group {wanted!r}"
        if abs(share.advantage - advantage) > _CLOSE:
            yield rid, f"step {share.step}: its advantage was {share.advantage:g}, by its group {advantage:g}"
    first = min(share.step for share in trained.values())
    if forgone and all(rid in trained and trained[rid].step <= first for rid in members):
        yield members[0], f"step {first}: its group was trained as {min(forgone)}, and all of it was there"
