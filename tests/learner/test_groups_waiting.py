"""The real learner on a real Redis with rewards: which groups are waited for, and that whoever takes over comes to the
same advantages. Feeder, workers and arbiter are played."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import Run, make_verdict

from actors.books import line_of
from common.metrics import REGISTRY
from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from common.rids import rid_of
from common.runfiles.records import BookLine, Trained
from common.wire import scripts
from learner.train import Learner
from ops.chaos.records import Records
from ops.chaos.rewards import reward_faults
from ops.reach.embedded import EmbeddedRedis

MODELS = {name: str(PACKAGE_ROOT / "ops" / "models" / name) for name in ("student", "teacher")}
GROUP = 3


class Bench:
    """A run whose learner can be asked for a batch, or be killed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.made: list[Learner] = []
        self.learner = self.begin()

    def begin(self) -> Learner:
        """A new learner; whoever was before it is gone, its lease with it."""
        self.run.client.delete(self.run.key("lease:learner"))
        facts = read_facts(Path(MODELS["student"]))
        pair = Pair(facts, facts, facts.stop_ids, facts.vocab_size)
        learner = Learner(self.run.config, self.run.plane, pair, threading.Event())
        learner.open()
        self.made.append(learner)
        learner.start()
        return learner

    def restart(self) -> None:
        self.learner = self.begin()

    def admit(self, *numbers: int, problem: int | None = None) -> None:
        for number in numbers:
            self.run.admit(rid_of(number), problem=number // GROUP if problem is None else problem)
        self.run.take()

    def write(self, number: int, standing: str, *, version: int = 0, train: int = 3) -> None:
        """A rollout of three tokens, from its admission to its standing."""
        self.admit(number)
        self.finish(number, version=version, train=train)
        self.stand(number, standing)

    def finish(self, number: int, *, version: int = 0, train: int = 3) -> None:
        rid = rid_of(number)
        self.run.chunk(rid, finish="eos", tokens=[2 + (number + place) % 8 for place in range(3)], version=version)
        self.run.score(rid)
        verdict = make_verdict(
            rid,
            problem=number // GROUP,
            train=train,
            keep=3,
            trigger=3,
            cut=False,
            finish_reason="eos",
            first_version=version,
            last_version=version,
        )
        call = scripts.verdict(rid, verdict.encode(), train, False, None, 4, None, self.run.score_entries())
        assert self.run.lease("arbiter").call(call) is scripts.Judged.OK

    def stand(self, number: int, standing: str) -> None:
        self.run.lease("feeder").call(scripts.reward(rid_of(number), standing))

    def batch(self) -> dict[int, tuple[float, str]] | None:
        """The next batch as advantage and reason by number; it is put back, as after a step that failed."""
        received = self.learner.next_batch(block_s=0.01)
        if received is None:
            return None
        self.learner._intake.put_back(received)
        return {
            int(one.trajectory.rid[1:]): (round(one.trajectory.advantage, 6), one.trajectory.without_reward)
            for one in received
        }

    def step(self) -> None:
        received = self.learner.next_batch(block_s=0.01)
        assert received is not None
        self.learner.step(received)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run.config.run_dir / name).read_text().splitlines()]

    def trained(self) -> dict[int, tuple[float, str]]:
        """What trained.jsonl says, by number."""
        return {
            int(rid[1:]): (round(advantage, 6), reason)
            for line in self.lines("trained.jsonl")
            for rid, advantage, reason in zip(line["rids"], line["advantages"], line["without_reward"], strict=True)
        }


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run], tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def new(batch_size: int = 3, mode: str = "reinforce_leave_one_out", **learner: Any) -> Bench:
        run = start(
            embedded_redis,
            runs_dir=str(tmp_path / str(len(benches))),
            student={"model": MODELS["student"]},
            teacher={"model": MODELS["teacher"]},
            data={"num_generations": GROUP},
            reward={"mode": mode, "weight": 0.5},
            learner={
                "batch_size": batch_size,
                "max_steps": 8,
                "max_staleness": 8,
                "learning_rate": 1e-3,
                "schedule": "constant",
                **learner,
            },
            checkpoints={"every_steps": 4, "keep": 2},
            eval={"every_steps": 0},
        )
        benches.append(Bench(run))
        return benches[-1]

    yield new
    for bench in benches:
        for learner in bench.made:
            learner.close()


def test_a_whole_group_has_its_advantages_once_all_are_judged(begin: Callable[..., Bench]) -> None:
    bench = begin()
    bench.admit(0, 1, 2)
    for number, standing in ((0, "right"), (1, "wrong")):
        bench.finish(number)
        bench.stand(number, standing)
    bench.finish(2)
    assert bench.batch() is None, "three trajectories are there, and one has no standing"
    bench.stand(2, "wrong")
    assert bench.batch() == {0: (1.0, ""), 1: (-0.5, ""), 2: (-0.5, "")}
    bench.step()
    [line] = bench.lines("metrics.jsonl")
    assert line["rewards"] == {"mean": pytest.approx(1 / 3), "signal": 1.0, "without": {}}
    assert REGISTRY.get_sample_value("katana_learner_reward_mean") == pytest.approx(1 / 3)
    assert REGISTRY.get_sample_value("katana_learner_reward_signal_ratio") == 1.0
    assert bench.trained() == {0: (1.0, ""), 1: (-0.5, ""), 2: (-0.5, "")}


def test_grpo_divides_by_the_deviation(begin: Callable[..., Bench]) -> None:
    bench = begin(mode="grpo")
    for number, standing in enumerate(("right", "wrong", "wrong")):
        bench.write(number, standing)
    # mean 1/3, deviation with n - 1: sqrt(1/3)
    assert bench.batch() == {0: (1.154701, ""), 1: (-0.57735, ""), 2: (-0.57735, "")}


def test_a_dead_member_decides_at_once_and_the_others_are_trained_without(begin: Callable[..., Bench]) -> None:
    counted = "katana_learner_groups_without_reward_total"
    before = REGISTRY.get_sample_value(counted, {"reason": "dead"}) or 0.0
    bench = begin(batch_size=2)
    bench.admit(0, 1, 2)
    bench.finish(0)
    bench.finish(1)
    assert bench.batch() is None
    bench.stand(2, "dead")
    assert bench.batch() == {0: (0.0, "dead"), 1: (0.0, "dead")}, "nobody waits for their own standings"
    bench.step()
    [line] = bench.lines("metrics.jsonl")
    assert line["rewards"] == {"mean": None, "signal": None, "without": {"dead": 1}}
    assert REGISTRY.get_sample_value(counted, {"reason": "dead"}) == before + 1


def test_a_member_that_is_stale_or_empty_counts_though_it_is_not_trained(begin: Callable[..., Bench]) -> None:
    bench = begin(batch_size=2, max_staleness=1)
    bench.write(0, "right", version=0)
    bench.admit(1, 2)
    bench.finish(1, version=1, train=0)  # its ending, empty, is on its way to the books
    bench.finish(2, version=2)
    bench.learner.version = 2  # the first is stale now
    assert bench.batch() is None
    bench.stand(1, "wrong")
    bench.stand(2, "wrong")
    bench.run.client.delete(bench.run.key(f"rollout:{rid_of(1)}"))  # booked
    bench.write(3, "right", version=2)
    bench.write(4, "wrong", version=2)
    bench.write(5, "wrong", version=2)
    found = bench.batch()
    assert found is not None and found[2] == (-0.5, "")
    assert [(one["ending"], one["reason"]) for one in bench.run.entries("finished") if one["kind"] == "ending"] == [
        ("dropped", "empty"),
        ("dropped", "stale"),
    ]


def test_a_sent_back_rollout_is_in_no_group_and_leaves_its_numbers_group_smaller(begin: Callable[..., Bench]) -> None:
    bench = begin()
    bench.write(0, "right")
    bench.admit(1, problem=17)
    bench.finish(1)
    bench.stand(1, "sent_back")
    bench.write(2, "wrong")
    assert bench.batch() == {0: (1.0, ""), 1: (0.0, "sent_back"), 2: (-1.0, "")}


def test_a_cut_rollout_without_a_reward_leaves_the_others_theirs(begin: Callable[..., Bench]) -> None:
    bench = begin()
    for number, standing in enumerate(("right", "cut", "wrong")):
        bench.write(number, standing)
    assert bench.batch() == {0: (1.0, ""), 1: (0.0, "cut"), 2: (-1.0, "")}
    bench = begin()
    for number, standing in enumerate(("right", "cut", "unknown")):
        bench.write(number, standing)
    assert bench.batch() == dict.fromkeys(range(3), (0.0, "few"))


def test_a_batch_that_is_due_splits_a_group_and_the_rest_of_it_knows(begin: Callable[..., Bench]) -> None:
    """Neither a batch size that is no multiple of the group, nor a limit on what is in flight, can lock the run."""
    bench = begin(batch_size=4)
    for number in range(4):
        bench.write(number, "right" if number % 2 else "wrong")
    whole = {0: (-0.5, ""), 1: (1.0, ""), 2: (-0.5, "")}
    assert bench.batch() == whole | {3: (0.0, "split")}
    bench.step()
    for number in range(4, 8):
        bench.write(number, "right" if number % 2 else "wrong")
    assert bench.batch() == {4: (0.0, "split"), 5: (0.0, "split"), 6: (0.0, "split"), 7: (0.0, "split")}


def test_groups_that_are_whole_come_first(begin: Callable[..., Bench]) -> None:
    bench = begin()
    bench.admit(0, 1, 2)
    bench.finish(0)
    bench.stand(0, "right")  # two of its group are being written
    bench.write(6, "right")  # of its group two are not admitted yet
    for number, standing in enumerate(("right", "wrong", "wrong"), 3):
        bench.write(number, standing)
    assert bench.batch() == {3: (1.0, ""), 4: (-0.5, ""), 5: (-0.5, "")}
    assert bench.run.client.hkeys(bench.run.key("rewards")) == [
        rid_of(number).encode() for number in (0, 6, 3, 4, 5)
    ], "nothing was forgone"


def test_who_would_be_stale_is_trained_without_its_group(begin: Callable[..., Bench]) -> None:
    bench = begin(max_staleness=2)
    bench.admit(0, 1, 2)
    bench.finish(0, version=0)
    bench.stand(0, "right")
    for number, standing in enumerate(("right", "wrong", "wrong"), 3):
        bench.write(number, standing, version=1)
    bench.learner.version = 2
    assert bench.batch() == {0: (0.0, "late"), 3: (1.0, ""), 4: (-0.5, "")}
    for number in (1, 2):
        bench.finish(number, version=2)
        bench.stand(number, "wrong")
    bench.learner.step(bench.learner.next_batch(block_s=0.01) or [])
    assert bench.batch() == {1: (0.0, "late"), 2: (0.0, "late"), 5: (-0.5, "")}


def feed(bench: Bench, begin: int, end: int, standings: Sequence[str] = ("right", "wrong", "wrong", "cut")) -> None:
    for number in range(begin, end):
        bench.write(number, standings[number % len(standings)])


def test_whoever_takes_over_at_any_point_trains_with_the_same_advantages(begin: Callable[..., Bench]) -> None:
    """Batches of four, groups of three: each boundary splits a group or finds one whole."""

    def play(killed: str) -> tuple[dict[int, tuple[float, str]], list[float]]:
        bench = begin(batch_size=4)
        for step in range(3):
            feed(bench, 4 * step, 4 * step + 4)
            if killed == "before the batch":
                bench.restart()
            elif killed == "between group and step":
                assert bench.learner.next_batch(block_s=0.01) is not None
                bench.restart()
            while bench.learner.step_count <= step:  # a new learner goes back to the checkpoint
                bench.step()
        if killed == "after steps without a checkpoint":  # all three are taken again
            feed(bench, 12, 16)  # and now more of the group that was split is there
            bench.restart()
            for _ in range(3):
                bench.step()
        return bench.trained(), [line["loss"] for line in bench.lines("metrics.jsonl")]

    expected, losses = play("")
    assert {reason for _, reason in expected.values()} == {"", "cut", "split"}
    for killed in ("before the batch", "between group and step", "after steps without a checkpoint"):
        assert play(killed) == (expected, losses), killed


def books(numbers: range) -> dict[str, BookLine]:
    """What the feeder books of `feed`."""
    found = {}
    for number in numbers:
        standing = ("right", "wrong", "wrong", "cut")[number % 4]
        verdict = make_verdict(
            rid_of(number),
            problem=number // GROUP,
            cut=standing == "cut",
            finish_reason="kl_trap" if standing == "cut" else "eos",
        )
        correct = {"right": True, "wrong": False}.get(standing)
        line = line_of(verdict, ending="trained", reason="", generated=3, staleness=0, active=True, correct=correct)
        found[line.rid] = replace(line, reward=standing)
    return found


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_checker_sees_a_learner_that_forgets_what_it_did_not_wait_for(
    begin: Callable[..., Bench], forgotten: bool
) -> None:
    bench = begin(batch_size=4)
    for step in range(3):
        feed(bench, 4 * step, 4 * step + 4)
        bench.step()
        if forgotten and step < 2:  # the third batch completes a group
            stored = bench.run.key("rewards")
            forgone = [name for name in bench.run.client.hkeys(stored) if name.startswith(b"group:")]
            assert forgone and bench.run.client.hdel(stored, *forgone)
            bench.learner.checkpoint()
            bench.restart()
    lines = [Trained.from_json(line) for line in bench.lines("trained.jsonl")]
    records = Records(config=bench.run.config, books=books(range(12)), trained=lines)
    said = [detail for _, detail in reward_faults(records, frozenset())]
    assert any("by its group 'split'" in detail for detail in said) if forgotten else said == []
