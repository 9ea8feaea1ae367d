"""The real learner on a real Redis: acknowledged after the checkpoint, nothing skipped, nothing trained twice."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samples import Run, fenced, make_score_support, make_support, make_tokens, make_verdict, script

import learner.train
from common import metrics
from common.metrics import REGISTRY
from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from common.wire.weights import read_pointer, verified
from learner.checkpoint import load_newest
from learner.head import LinearHead
from learner.lora import make_student
from learner.train import Learner
from ops.reach.embedded import EmbeddedRedis

MODELS = {name: str(PACKAGE_ROOT / "ops" / "models" / name) for name in ("student", "teacher")}


class Crash(RuntimeError):
    """Where the learner is killed."""


MADE: list[Learner] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(
        embedded_redis,
        student={"model": MODELS["student"]},
        teacher={"model": MODELS["teacher"]},
        learner={"batch_size": 2, "max_steps": 4, "max_staleness": 8, "learning_rate": 1e-3, "schedule": "constant"},
        checkpoints={"every_steps": 2, "keep": 2},
        eval={"every_steps": 0},
    )


def pair_of_students() -> Pair:
    facts = read_facts(Path(MODELS["student"]))
    return Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size)


def learning(run: Run, **settings: Any) -> None:
    """Other settings of the learner."""
    run.config = run.config.model_copy(update={"learner": run.config.learner.model_copy(update=settings)})


def make_learner(run: Run) -> Learner:
    """A new learner; whoever was before it is gone, its lease with it."""
    run.client.delete(run.key("lease:learner"))
    learner_ = Learner(run.config, run.plane, pair_of_students(), threading.Event())
    learner_.open()
    MADE.append(learner_)
    return learner_


def trajectory(run: Run, number: int, *, version: int = 0, arm: str = "treated") -> str:
    """A rollout of three tokens, scored and judged."""
    rid = f"r{number}"
    run.admit(rid, arm=arm)
    run.take()
    tokens = [2 + (number + place) % 8 for place in range(3)]
    run.chunk(rid, finish="eos", tokens=tokens, version=version)
    run.score(rid)
    run.lease("arbiter")
    verdict = make_verdict(
        rid, arm=arm, train=3, keep=3, trigger=3, cut=arm == "treated", first_version=version, last_version=version
    )
    entries = run.score_entries()
    assert (
        run.lease("arbiter").call(fenced("verdict", rid, verdict.encode(), 3, 0, "", 4, "inactive", "", *entries))[0]
        == b"ok"
    )
    return rid


def endings(run: Run) -> list[tuple[str, str]]:
    return [(line["rid"], line["ending"]) for line in run.entries("finished") if line["kind"] == "ending"]


def take_step(learner_: Learner) -> None:
    batch = learner_.next_batch(block_s=0.01)
    assert batch is not None
    learner_.step(batch)


def steps_on_record(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_trajectory_is_acknowledged_with_the_checkpoint_that_holds_it_and_not_before(run: Run) -> None:
    for number in range(4):
        trajectory(run, number)
    learner_ = make_learner(run)
    learner_.start()
    take_step(learner_)
    assert endings(run) == []
    assert run.pending("trajectories") == 4
    take_step(learner_)
    assert endings(run) == [(f"r{number}", "trained") for number in range(4)]
    assert run.pending("trajectories") == 0
    state = load_newest(run.config.run_dir / "checkpoints")
    assert state is not None
    assert (state.step, state.consumed) == (2, ("r0", "r1", "r2", "r3"))


def test_a_checkpoint_that_takes_longer_than_the_lease_does_not_lose_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = run.config.liveness.model_copy(update={"learner_lease_s": 0.3})
    run.config = run.config.model_copy(update={"liveness": short})
    for number in range(2):
        trajectory(run, number)
    first = make_learner(run)
    save = learner.train.save

    def slowly(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            taken = run.plane.call(script("lease", "learner", "another", 300, "take"))
            assert taken == [b"held"], "another learner took the run over"
            time.sleep(0.02)
        return save(*args, **kwargs)

    monkeypatch.setattr(learner.train, "save", slowly)
    first.run(until_idle=True)
    assert endings(run) == [("r0", "trained"), ("r1", "trained")]
    time.sleep(0.35)
    assert run.plane.call(script("lease", "learner", "another", 300, "take")) == [b"ok"], "nobody renews it any more"


def test_starving_on_a_redis_without_room_it_lets_go_of_what_it_trained(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the steps that are left until the checkpoint wait for rollouts, and those for what it would take off."""
    monkeypatch.setattr(learner.train, "STARVED_S", 0.0)
    for number in range(3):
        trajectory(run, number)
    learner_ = make_learner(run)
    learner_.start()
    memory = {"used_memory": 750, "maxmemory": 1000}
    monkeypatch.setattr(run.plane, "memory", lambda: memory)
    assert learner_.next_batch(block_s=0.01) is not None  # what is there is not starved of
    learner_ = make_learner(run)
    learner_.start()
    take_step(learner_)
    memory["maxmemory"] = 1 << 40
    assert learner_.next_batch(block_s=0.01) is None
    assert endings(run) == [], "there is room for a batch: the checkpoint is not due"
    memory["maxmemory"] = 0
    assert learner_.next_batch(block_s=0.01) is None
    assert endings(run) == [], "Redis has no limit"
    memory["maxmemory"] = 1000
    assert learner_.next_batch(block_s=0.01) is None
    assert endings(run) == [("r0", "trained"), ("r1", "trained")]
    state = load_newest(run.config.run_dir / "checkpoints")
    assert state is not None
    assert (state.step, state.consumed) == (1, ("r0", "r1"))
    written = (run.config.run_dir / "checkpoints" / "step-00000001").stat().st_mtime_ns
    assert learner_.next_batch(block_s=0.01) is None
    assert (run.config.run_dir / "checkpoints" / "step-00000001").stat().st_mtime_ns == written, "nothing new to cover"
    trajectory(run, 3)
    take_step(learner_)
    assert endings(run)[2:] == [("r2", "trained"), ("r3", "trained")]  # the one that is due, as ever


def test_weights_that_nobody_can_take_are_published_again_when_no_batch_comes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner.train, "STARVED_S", 0.0)
    learner_ = make_learner(run)
    learner_.start()
    announced = read_pointer(run.plane.policy())
    assert announced is not None
    (run.config.run_dir / "weights" / announced[0].file).write_bytes(b"torn")
    assert learner_.next_batch(0.001) is None
    assert learner_.version == announced[0].version, "nobody has asked for it"
    run.plane.refuse(announced[0].version)
    assert learner_.next_batch(0.001) is None
    again = read_pointer(run.plane.policy())
    assert again is not None and again[0].version == announced[0].version + 1
    assert verified(run.config.run_dir / "weights", again[0])
    assert learner_.next_batch(0.001) is None
    assert learner_.version == again[0].version, "once"


def test_killed_before_the_checkpoint_it_trains_the_same_again_to_the_same_weights(run: Run) -> None:
    for number in range(4):
        trajectory(run, number)
    first = make_learner(run)
    first.start()
    take_step(first)
    after_one = {name: tensor.clone() for name, tensor in first.student.model.state_dict().items()}
    second = make_learner(run)
    second.start()
    assert steps_on_record(run) == [], "steps that will be done again stand in metrics.jsonl"
    take_step(second)
    assert all(torch.equal(after_one[name], tensor) for name, tensor in second.student.model.state_dict().items())
    take_step(second)
    assert steps_on_record(run) == [1, 2]
    assert endings(run) == [(f"r{number}", "trained") for number in range(4)]
    versions = int(run.plane.policy()["version"])
    assert versions > 2, "a resumed learner publishes above what was announced before"


def test_killed_between_checkpoint_and_acknowledgement_it_acknowledges_and_does_not_train_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        trajectory(run, number)
    first = make_learner(run)
    first.start()
    take_step(first)

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(learner.intake.Intake, "settle", crash)
        with pytest.raises(Crash):
            take_step(first)
    assert endings(run) == []
    second = make_learner(run)
    second.start()
    assert endings(run) == [(f"r{number}", "trained") for number in range(4)]
    assert second.step_count == 2
    batch = second.next_batch(block_s=0.01)
    assert batch is not None
    assert [one.trajectory.rid for one in batch] == ["r4", "r5"]


def test_stale_trajectories_are_dropped_and_counted_by_arm(run: Run) -> None:
    trajectory(run, 0, version=0)
    trajectory(run, 1, version=0, arm="control")
    learner_ = make_learner(run)
    learner_.start()
    learner_.version = 9  # max_staleness is 8
    trajectory(run, 2, version=1)
    trajectory(run, 3, version=9)
    batch = learner_.next_batch(block_s=0.01)
    assert batch is not None
    assert [one.trajectory.rid for one in batch] == ["r2", "r3"]
    learner_.step(batch)
    assert lines_of(run)[-1]["stale_dropped"] == {"treated": 1, "control": 1}
    lines = [line for line in run.entries("finished") if line["kind"] == "ending"]
    assert [(line["rid"], line["ending"], line["reason"], line["staleness"]) for line in lines] == [
        ("r0", "dropped", "stale", "9"),
        ("r1", "dropped", "stale", "9"),
    ]


def test_the_end_leaves_a_model_that_loads_and_tells_the_feeder(run: Run) -> None:
    for number in range(8):
        trajectory(run, number)
    run.client.delete(run.key("lease:learner"))
    facts = read_facts(Path(MODELS["student"]))
    learner_ = Learner(
        run.config, run.plane, Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size), threading.Event()
    )
    learner_.run(until_idle=True)
    assert run.plane.state() == "trained"
    assert steps_on_record(run) == [1, 2, 3, 4]
    saved = load_file(run.config.run_dir / "model" / "model.safetensors")
    assert saved.keys() <= learner_.student.model.state_dict().keys()
    assert all(torch.equal(tensor, learner_.student.model.state_dict()[name]) for name, tensor in saved.items())
    assert (run.config.run_dir / "model" / "tokenizer.json").exists()
    lines = [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] >= 0 and line["learning_rate"] == pytest.approx(1e-3) for line in lines)
    assert [line["policy_version"] for line in lines] == [1, 2, 3, 4]


def test_in_bfloat16_the_head_alone_computes_in_float32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    learning(run, dtype="bfloat16")
    made, trunk = [], []

    def logits(self: LinearHead, rows: torch.Tensor, out: torch.Tensor) -> None:
        make(self, rows, out)
        made.append((out.clone(), rows.double() @ self.layer.weight[: out.shape[1]].double().T))

    make = LinearHead.logits
    monkeypatch.setattr(LinearHead, "logits", logits)
    for number in range(2):
        trajectory(run, number)
    learner_ = make_learner(run)
    learner_.student.model.model.layers[0].mlp.register_forward_hook(lambda *args: trunk.append(args[-1].dtype))
    learner_.start()
    made.clear()
    take_step(learner_)
    assert made and set(trunk) == {torch.bfloat16}
    for found, expected in made:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_trajectory_that_cannot_be_read_dies_with_its_reason_and_the_rest_is_trained(run: Run) -> None:
    for number in range(3):
        trajectory(run, number)
    run.client.hset(run.key("rollout:r0"), "q:0", b"broken")
    run.client.xadd(run.key("trajectories"), {"what": "?"})
    learner_ = make_learner(run)
    learner_.start()
    batch = learner_.next_batch(block_s=0.01)
    assert batch is not None
    assert [one.trajectory.rid for one in batch] == ["r1", "r2"]
    assert ("r0", "dead") in endings(run)
    assert len(run.entries("dead")) == 2


def _trains_nothing() -> dict[str, bytes]:
    return {"verdict": make_verdict("r0", train=0).encode()}


def _chunks_of_unequal_support() -> dict[str, bytes]:
    n = 6
    verdict = make_verdict(
        "r0", trigger=n, keep=n, train=n, tokens=np.full(n, 2, np.int32), divergence=np.zeros(n, np.float32)
    )
    return {
        "verdict": verdict.encode(),
        "t:1": make_tokens(seq=1, start=3).encode(),
        "p:1": make_support(3, 3).encode(),
        "q:1": make_score_support(3, 3).encode(),
    }


@pytest.mark.parametrize("breaking", [_trains_nothing, _chunks_of_unequal_support])
def test_a_record_broken_after_its_verdict_dies_and_the_rest_is_trained(
    run: Run, breaking: Callable[[], dict[str, bytes]]
) -> None:
    for number in range(3):
        trajectory(run, number)
    run.client.hset(run.key("rollout:r0"), mapping=dict(breaking()))
    learner_ = make_learner(run)
    learner_.start()
    batch = learner_.next_batch(block_s=0.01)
    assert batch is not None
    assert [one.trajectory.rid for one in batch] == ["r1", "r2"]
    assert ("r0", "dead") in endings(run)
    assert [entry["stage"] for entry in run.entries("dead")] == ["trajectories"]


# --- a budget of generated tokens ---


@pytest.fixture
def budget(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Callable[..., Run]:
    def begin(tokens: int, every_s: float | None = None, **learner: Any) -> Run:
        steps = {"batch_size": 2, "max_steps": 9, "max_staleness": 8, "learning_rate": 1e-3}
        return start(
            embedded_redis,
            student={"model": MODELS["student"]},
            teacher={"model": MODELS["teacher"]},
            learner=steps | {"max_generated_tokens": tokens} | learner,
            checkpoints={"every_steps": 4, "every_s": every_s, "keep": 2},
            eval={"every_steps": 5},
        )

    return begin


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def one_step(run: Run, learner_: Learner, number: int) -> None:
    """A batch is written, three tokens a rollout, and trained on."""
    for rollout in (2 * number, 2 * number + 1):
        trajectory(run, rollout)
    take_step(learner_)


def evaluated(run: Run) -> list[int]:
    return sorted(json.loads(path.read_text())["step"] for path in (run.config.run_dir / "eval").glob("*.json"))


@pytest.mark.parametrize(("every_s", "held"), [(1e-6, [1, 2, 3, 4]), (3600.0, [0, 0, 0, 4]), (None, [0, 0, 0, 4])])
def test_checkpoints_come_by_time_and_by_steps(
    budget: Callable[..., Run], every_s: float | None, held: list[int]
) -> None:
    """The step of the newest checkpoint after each of four steps, one of which ends what `every_steps` says."""
    run = budget(1000, every_s)
    learner_ = make_learner(run)
    learner_.start()
    for number, expected in enumerate(held):
        one_step(run, learner_, number)
        state = load_newest(run.config.run_dir / "checkpoints")
        assert (state.step if state else 0) == expected
        assert len(endings(run)) == 2 * expected


def test_the_run_ends_with_the_step_at_which_its_tokens_are_spent(budget: Callable[..., Run]) -> None:
    run = budget(18, weight_sync_steps=2, warmup_ratio=0.0)
    learner_ = make_learner(run)
    learner_.start()
    for number in range(3):
        assert not learner_.done
        one_step(run, learner_, number)
    assert learner_.done
    # As for the last of max_steps: published, kept for evaluation, in a checkpoint, acknowledged.
    assert run.plane.policy()["step"] == "3"
    assert evaluated(run) == [0, 3]
    state = load_newest(run.config.run_dir / "checkpoints")
    assert state is not None
    assert (state.step, state.counters["tokens_generated"]) == (3, 18)
    assert len(endings(run)) == 6
    assert [line["tokens_generated"] for line in lines_of(run)] == [6, 12, 18]
    # 1e-3 (1 + cos(pi g / 18)) / 2, g = 0, 6, 12: what was counted when the step before ended
    assert [line["learning_rate"] for line in lines_of(run)] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])


def test_the_loop_ends_with_the_budget_and_again_when_it_is_started_again(budget: Callable[..., Run]) -> None:
    run = budget(9)
    for number in range(6):
        trajectory(run, number)  # 18 tokens
    for _ in range(2):
        run.client.delete(run.key("lease:learner"))
        facts = read_facts(Path(MODELS["student"]))
        pair = Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size)
        learner_ = Learner(run.config, run.plane, pair, threading.Event())
        learner_.run(until_idle=True)
        assert (learner_.step_count, run.plane.state()) == (1, "trained")
        assert (run.config.run_dir / "model" / "model.safetensors").exists()
        run.client.set(run.key("run"), "open")


def test_max_steps_ends_a_run_that_has_tokens_left(budget: Callable[..., Run]) -> None:
    run = budget(1000, max_steps=2)
    learner_ = make_learner(run)
    learner_.start()
    one_step(run, learner_, 0)
    assert not learner_.done
    one_step(run, learner_, 1)
    assert learner_.done
    assert evaluated(run) == [0, 2]


def test_what_is_written_while_a_learner_is_down_changes_no_step_that_is_done_again(budget: Callable[..., Run]) -> None:
    """Neither their learning rates nor which one is the last: a killed learner trains the same to the same weights."""
    run = budget(24, warmup_ratio=0.5)
    first = make_learner(run)
    first.start()
    for number in range(2):
        one_step(run, first, number)
    before, weights = lines_of(run), {name: tensor.clone() for name, tensor in first.student.model.state_dict().items()}
    # 6 of 12, then (6 + 6) of 12: the second step reaches the base.
    assert [line["learning_rate"] for line in before] == pytest.approx([0.5e-3, 1e-3])
    for number in range(4, 12):
        trajectory(run, number)
    assert run.plane.generated() == 36  # more than the budget
    second = make_learner(run)
    second.start()
    assert (second.step_count, second.done) == (0, False)
    for _ in range(2):
        take_step(second)
    for line, former in zip(lines_of(run), before, strict=True):
        for name in ("step", "learning_rate", "tokens_generated", "loss"):
            assert line[name] == former[name]
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.student.model.state_dict().items())
    assert not second.done
    take_step(second)
    assert (second.done, second.step_count, second.tokens_generated) == (True, 3, 36)


def test_two_kills_within_one_checkpoint_change_no_step_either(budget: Callable[..., Run]) -> None:
    run = budget(24)
    first = make_learner(run)
    first.start()
    for number in range(2):
        one_step(run, first, number)
    for number in range(4, 12):
        trajectory(run, number)
    make_learner(run).start()  # killed before its first step
    third = make_learner(run)
    third.start()
    for tokens in (6, 12, 36):
        assert not third.done
        take_step(third)
        assert third.tokens_generated == tokens
    assert third.done


def test_a_count_that_redis_lost_takes_nothing_back(budget: Callable[..., Run]) -> None:
    run = budget(18, warmup_ratio=0.0)
    learner_ = make_learner(run)
    learner_.start()
    for number in range(2):
        one_step(run, learner_, number)
    run.client.hset(run.key("policy"), "generated", "no number")
    one_step(run, learner_, 2)
    assert learner_.tokens_generated == 12 and not learner_.done
    # As many tokens again, not the whole budget again.
    one_step(run, learner_, 3)
    assert [line["tokens_generated"] for line in lines_of(run)] == [6, 12, 12, 18]
    rates = [line["learning_rate"] for line in lines_of(run)]
    assert rates == sorted(rates, reverse=True)


def test_spoilt_counts_are_no_obstacle(budget: Callable[..., Run]) -> None:
    run = budget(1000)
    first = make_learner(run)
    first.start()
    one_step(run, first, 0)
    (run.config.run_dir / "counted.json").write_text("[1]")
    second = make_learner(run)
    second.start()
    take_step(second)
    assert second.tokens_generated == 6


def test_a_finished_run_goes_on_when_its_budget_is_raised(budget: Callable[..., Run]) -> None:
    run = budget(6)
    first = make_learner(run)
    first.start()
    one_step(run, first, 0)
    assert first.done
    learning(run, max_generated_tokens=12)
    second = make_learner(run)
    second.start()
    assert (second.step_count, second.done) == (1, False)
    one_step(run, second, 1)
    assert second.done


# --- drift guards ---


def guard(kind: str) -> float | None:
    return REGISTRY.get_sample_value("katana_learner_drift_ratio", {"kind": kind})


def test_a_step_records_its_drift_guards_and_what_it_cannot_tell_leaves_the_gauge_alone(run: Run) -> None:
    trajectory(run, 0)
    trajectory(run, 1, arm="control")
    learner_ = make_learner(run)
    learner_.start()
    take_step(learner_)
    metrics.learner_drift.labels("cut_control").set(0.75)
    for number in (2, 3):
        trajectory(run, number)
    take_step(learner_)
    first, second = lines_of(run)
    # Three tokens repeat nothing; a threshold of 0.25; the treated are cut behind all that was scored.
    assert (first["repetition"], first["truncation_rate"], first["threshold"]) == (0.0, 0.0, 0.25)
    assert (first["cut_rate_treated"], first["cut_rate_control"]) == (1.0, 0.0)
    assert (second["cut_rate_treated"], second["cut_rate_control"]) == (1.0, None)
    assert guard("cut_control") == 0.75
    assert guard("topk_overlap") == second["topk_overlap"]
    for name in ("support_mass", "support_mass_teacher", "topk_overlap"):
        assert 0 <= second[name] <= 1.000001
    assert REGISTRY.get_sample_value("katana_learner_entropy_nats") == second["entropy"]
    assert REGISTRY.get_sample_value("katana_learner_threshold_nats") == 0.25


def test_several_updates_on_a_batch_are_one_step_whose_trajectories_are_trained_once(run: Run) -> None:
    learning(run, num_iterations=3, learning_rate=1e-5)
    for number in range(2):
        trajectory(run, number)
    learner_ = make_learner(run)
    learner_.start()
    version = learner_.version
    alone = make_student(Path(MODELS["student"]), run.config)
    batch = learner_.next_batch(block_s=0.01)
    assert batch is not None
    learner_.step(batch)
    learner_.checkpoint()

    losses = []
    for _ in range(3):
        loss, _ = alone.add_gradients(
            [one.trajectory for one in batch],
            pair_of_students(),
            max_tokens=run.config.learner.micro_batch_tokens,
            busy=contextlib.nullcontext,
            between=lambda: None,
        )
        alone.clip()
        alone.step(1e-5)
        losses.append(loss)
    for (name, found), (_, expected) in zip(
        learner_.student.model.state_dict().items(), alone.model.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert losses[2] < losses[1] < losses[0]

    (line,) = map(json.loads, (run.config.run_dir / "metrics.jsonl").read_text().splitlines())
    assert (line["step"], line["loss"], line["trajectories"]) == (1, losses[0], 2)
    assert (line["reuse"]["iterations"], line["reuse"]["loss"]) == (3, losses[2])
    assert line["ratio_max"] != line["reuse"]["ratio_max"]
    assert learner_.version == version + 1
    assert endings(run) == [("r0", "trained"), ("r1", "trained")]


def test_an_update_that_fails_after_the_first_ends_the_step_and_gives_nothing_back(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    learning(run, num_iterations=3, learning_rate=1e30)  # no update makes sense after the first
    for number in range(2):
        trajectory(run, number)
    learner_ = make_learner(run)
    learner_.start()
    take_step(learner_)
    assert "step 1: 1 of 3 updates on its batch" in caplog.text
    (line,) = map(json.loads, (run.config.run_dir / "metrics.jsonl").read_text().splitlines())
    assert line["reuse"] == {"iterations": 1, "loss": None, "kl": None, "ratio_mean": None, "ratio_max": None}
    learner_.checkpoint()
    assert endings(run) == [("r0", "trained"), ("r1", "trained")]
    assert learner_.next_batch(block_s=0.01) is None
