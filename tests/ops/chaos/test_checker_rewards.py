"""The checker's statement on rewards: an honest record passes, and each thing that is wrong in it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from samples import make_config, make_verdict

from actors.books import line_of, unjudged_line
from common.rids import rid_of
from common.runfiles.records import BookLine, Trained
from ops.chaos.records import Records
from ops.chaos.rewards import reward_faults
from ops.stats.rewards import reward_totals, words

SIZE = 3


def book(number: int, standing: str | None, **changes: Any) -> BookLine:
    stopped = standing == "cut"
    verdict = make_verdict(
        rid_of(number),
        problem=changes.pop("problem", number // SIZE),
        cut=changes.pop("stopped", stopped),
        finish_reason="kl_trap" if stopped else "eos",
    )
    line = line_of(
        verdict,
        ending="trained",
        reason="",
        generated=3,
        staleness=0,
        active=True,
        correct={"right": True, "wrong": False}.get(standing or ""),
    )
    return BookLine.from_json(line.to_json() | {"reward": standing} | changes)


def trained(step: int, **shares: tuple[float, str]) -> Trained:
    """`shares`: n0=(advantage, reason)."""
    rids = [rid_of(int(name[1:])) for name in shares]
    return Trained(
        step,
        step,
        rids,
        [2] * len(rids),
        ["d"] * len(rids),
        [advantage for advantage, _ in shares.values()],
        [reason for _, reason in shares.values()],
    )


def honest(folder: Path) -> Records:
    """A whole group, one with a dead member, one that was split, and one with a rollout that was sent back."""
    lines = [
        *(book(0, "right"), book(1, "wrong"), book(2, "cut")),
        *(book(3, "right"), book(4, "wrong")),
        *(book(6, "right"), book(7, "wrong"), book(8, "right")),
        *(book(9, "right"), book(10, "sent_back", problem=1), book(11, "wrong")),
    ]
    dead = unjudged_line(rid_of(5), "treated", 1, ending="dead", reason="rollout", generated=0)
    lines.append(BookLine.from_json(dead.to_json() | {"reward": "dead"}))
    config = make_config(
        folder, data={"num_generations": SIZE}, reward={"mode": "reinforce_leave_one_out", "weight": 1.0}
    )
    return Records(
        config=config,
        books={line.rid: line for line in lines},
        trained=[
            trained(1, n0=(1.0, ""), n1=(-1.0, ""), n2=(0.0, "cut"), n3=(0.0, "dead"), n6=(0.0, "split")),
            trained(2, n4=(0.0, "dead"), n7=(0.0, "split"), n8=(0.0, "split")),
            trained(3, n9=(1.0, ""), n10=(0.0, "sent_back"), n11=(-1.0, "")),
        ],
    )


def faults(records: Records, excused: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    return list(reward_faults(records, excused))


def test_an_honest_record_passes(tmp_path: Path) -> None:
    assert faults(honest(tmp_path)) == []


def test_a_run_without_rewards_is_not_looked_at(tmp_path: Path) -> None:
    records = honest(tmp_path)
    records.config = make_config(tmp_path)
    records.trained = [trained(1, n0=(7.0, ""))]
    assert faults(records) == []


@pytest.mark.parametrize(
    ("step", "share", "said"),
    [
        (0, {"n0": (0.5, "")}, "its advantage was 0.5, by its group 1"),
        (0, {"n1": (0.0, "few")}, "trained without reward as 'few', by its group ''"),
        (0, {"n2": (-1.0, "")}, "trained without reward as '', by its group 'cut'"),
        (0, {"n3": (1.0, "")}, "by its group 'dead'"),
        (0, {"n6": (0.5, "")}, "by its group 'split'"),
        (1, {"n7": (0.0, "late")}, "by its group"),
        (2, {"n10": (1.0, "")}, "by its group 'sent_back'"),
    ],
)
def test_what_was_trained_with_another_advantage_is_named(
    tmp_path: Path, step: int, share: dict[str, tuple[float, str]], said: str
) -> None:
    records = honest(tmp_path)
    line = records.trained[step]
    known = dict(zip(line.rids, zip(line.advantages, line.without_reward, strict=True), strict=True))
    changed = {f"n{int(rid[1:])}": one for rid, one in known.items()} | share
    records.trained[step] = trained(step + 1, **changed)
    assert any(said in detail for _, detail in faults(records)), faults(records)


def test_a_whole_group_that_was_given_up_without_need_is_named(tmp_path: Path) -> None:
    records = honest(tmp_path)
    records.trained = [trained(1, n0=(0.0, "split"), n1=(0.0, "split"), n2=(0.0, "split"))]
    assert faults(records) == [(rid_of(0), "step 1: its group was trained as split, and all of it was there")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (book(0, "right", correct=False), "its standing is right, by its verdict wrong"),
        (book(0, "wrong", stopped=True, finish_reason="kl_trap"), "its standing is wrong, by its verdict cut"),
        (book(0, "right", problem=4), "its standing is right, by its verdict sent_back"),
        (book(0, "fine"), "its standing is 'fine'"),
        (book(0, None), "its standing is None"),
    ],
)
def test_a_standing_that_is_not_the_verdicts_is_named(tmp_path: Path, line: BookLine, said: str) -> None:
    records = honest(tmp_path)
    records.trained = []
    records.books[line.rid] = line
    assert faults(records) == [(line.rid, said)]


def test_standings_that_a_lost_redis_took_are_excused_with_their_groups(tmp_path: Path) -> None:
    records = honest(tmp_path)
    records.books[rid_of(2)] = unjudged_line(rid_of(2), "treated", 0, ending="dropped", reason="lost", generated=0)
    assert faults(records) == [
        (rid_of(rid), "step 1: its group was decided, and not all of it have a standing") for rid in (0, 1, 2)
    ]
    assert faults(records, frozenset({rid_of(2)})) == []


def test_a_line_without_advantages_is_named(tmp_path: Path) -> None:
    records = honest(tmp_path)
    records.trained.append(Trained(4, 4, ["r000000012"], [2], ["d"]))
    assert faults(records) == [("", "step 4: trained.jsonl has no advantages")]


def test_totals_count_each_group_once(tmp_path: Path) -> None:
    records = honest(tmp_path)
    found = reward_totals(records.trained, records.books.values(), SIZE)
    assert found.to_json() == {
        "mean": 5 / 9,
        "groups": 2,
        "with_signal": 2,
        "without": {"dead": 1, "split": 1},
        "sent_back": 1,
    }
    assert words(found) == (
        "mean reward 0.556; 2 groups rewarded, 2 of them with rewards that differ; 2 without reward (dead 1, split 1); "
        "1 rollouts sent back, in no group"
    )
