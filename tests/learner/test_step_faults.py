"""A batch that the learner fails on: the trajectory at fault is set aside, and the attempt changes nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Run, fenced, make_verdict
from torch import Tensor

from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from learner import gradients
from learner.culprits import StepImpossible
from learner.train import Learner
from ops.reach.embedded import EmbeddedRedis

MODELS = {name: str(PACKAGE_ROOT / "ops" / "models" / name) for name in ("student", "teacher")}
MADE: list[Learner] = []


class Killed(BaseException):
    """Where the process would have ended."""


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Callable[..., Run]:
    def begun(trajectories: int, **learner: Any) -> Run:
        steps = {"batch_size": 4, "max_steps": 2, "max_staleness": 99, "learning_rate": 1e-3, "schedule": "constant"}
        run = start(
            embedded_redis,
            student={"model": MODELS["student"]},
            teacher={"model": MODELS["teacher"]},
            learner=steps | learner,
            checkpoints={"every_steps": 2, "keep": 2},
            eval={"every_steps": 0},
        )
        for number in range(trajectories):
            _judged(run, number)
        return run

    return begun


def _judged(run: Run, number: int) -> None:
    rid, tokens = f"r{number}", [2 + (number + place) % 8 for place in range(3)]
    run.admit(rid)
    run.take()
    run.chunk(rid, finish="eos", tokens=tokens)
    run.score(rid)
    verdict = make_verdict(rid, train=3, keep=3, trigger=3, cut=False, first_version=0, last_version=0)
    reply = run.lease("arbiter").call(
        fenced("verdict", rid, verdict.encode(), 3, 0, "", 4, "inactive", "", *run.score_entries())
    )
    assert reply[0] == b"ok"


def learner_of(run: Run) -> Learner:
    """A new learner that has started; the one before it is gone, and so is its lease."""
    run.client.delete(run.key("lease:learner"))
    facts = read_facts(Path(MODELS["student"]))
    learner = Learner(
        run.config, run.plane, Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size), threading.Event()
    )
    MADE.append(learner)
    return learner


def spoil(monkeypatch: pytest.MonkeyPatch, *rids: str, how: Callable[[Tensor], Tensor]) -> None:
    """Apply `how` to what enters the head for every micro-batch that contains one of these."""
    kept = gradients.kept_rows

    def spoilt(model: Any, head: Any, micro: Any) -> Tensor:
        rows = kept(model, head, micro)
        return how(rows) if set(rids) & set(micro.rids) else rows

    monkeypatch.setattr(gradients, "kept_rows", spoilt)


def not_a_number(rows: Tensor) -> Tensor:
    return rows * torch.nan


def fails(error: BaseException) -> Callable[[Tensor], Tensor]:
    def fail(_: Tensor) -> Tensor:
        raise error

    return fail


def endings(run: Run) -> dict[str, str]:
    found = [(line["rid"], line["ending"]) for line in run.entries("finished") if line["kind"] == "ending"]
    assert len(dict(found)) == len(found), "a rollout ended twice"
    return dict(found)


def trained(run: Run) -> list[list[str]]:
    return [json.loads(line)["rids"] for line in (run.config.run_dir / "trained.jsonl").read_text().splitlines()]


def weights(learner: Learner) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in learner.student.model.state_dict().items()}
    for name, parameter in learner.student.model.named_parameters():
        for key, value in learner.student.optimizer.state[parameter].items():
            state[f"{name}/{key}"] = value.clone()
    return state


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (not_a_number, "FloatingPointError: the loss is nan"),
        (fails(IndexError("index out of range in self")), "IndexError: index out of range in self"),
        (fails(RuntimeError("CUDA out of memory")), "RuntimeError: CUDA out of memory"),
    ],
    ids=["not finite", "raises", "memory"],
)
def test_the_trajectory_at_fault_is_set_aside_and_the_run_continues_as_without_it(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, how: Callable[[Tensor], Tensor], reason: str
) -> None:
    def end(run: Run) -> Learner:
        learner = learner_of(run)
        learner.run(until_idle=True)
        return learner

    run = begin(9, micro_batch_tokens=64)
    spoil(monkeypatch, "r2", how=how)
    learner = end(run)
    assert trained(run) == [["r0", "r1", "r3", "r4"], ["r5", "r6", "r7", "r8"]]
    assert endings(run) == {f"r{number}": "dead" if number == 2 else "trained" for number in range(9)}
    [dead] = run.entries("dead")
    assert (dead["rid"], dead["stage"]) == ("r2", "learner")
    assert dead["reason"].startswith(reason)
    assert run.pending("trajectories") == 0
    # Those that were trained on, and no other attempt before them.
    monkeypatch.undo()
    other = begin(9)
    other.client.xdel(other.key("trajectories"), other.client.xrange(other.key("trajectories"))[2][0])
    want = weights(end(other))
    got = weights(learner)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_several_at_fault_also_all_of_a_batch_are_set_aside(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(13)
    spoil(monkeypatch, "r0", "r1", "r2", "r3", "r6", how=not_a_number)
    learner_of(run).run(until_idle=True)
    assert trained(run) == [["r4", "r5", "r7", "r8"], ["r9", "r10", "r11", "r12"]]
    assert sorted(rid for rid, ending in endings(run).items() if ending == "dead") == ["r0", "r1", "r2", "r3", "r6"]


def test_a_loss_that_is_not_finite_takes_no_step_although_its_gradient_is(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would fail only when its line in metrics.jsonl is written, after the step."""
    run = begin(9)
    losses = gradients.token_losses

    def infinite(settings: Any, student: Any, micro: Any) -> Tensor:
        return losses(settings, student, micro) + (torch.inf if "r1" in micro.rids else 0.0)

    monkeypatch.setattr(gradients, "token_losses", infinite)
    learner_of(run).run(until_idle=True)
    assert endings(run)["r1"] == "dead"
    assert len(trained(run)) == 2


def test_parameters_that_are_not_finite_end_the_run_and_set_nothing_aside(begin: Callable[..., Run]) -> None:
    run = begin(4)
    learner = learner_of(run)
    with torch.no_grad():
        next(learner.student.model.parameters()).fill_(torch.nan)
    with pytest.raises(StepImpossible, match=r"step 1: .*; a trajectory that always works fails too"):
        learner.run(until_idle=True)
    assert (endings(run), run.entries("dead")) == ({}, [])
    assert run.pending("trajectories") == 4


def test_a_batch_that_fails_only_as_a_whole_ends_the_run_and_sets_nothing_aside(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(4)
    kept = gradients.kept_rows

    def together(model: Any, head: Any, micro: Any) -> Tensor:
        if len(micro.rids) > 1:
            raise RuntimeError("no such kernel")
        return kept(model, head, micro)

    monkeypatch.setattr(gradients, "kept_rows", together)
    with pytest.raises(StepImpossible, match="no such kernel; none of its 4 trajectories fails alone"):
        learner_of(run).run(until_idle=True)
    assert (endings(run), run.entries("dead")) == ({}, [])


def test_a_failure_of_every_trajectory_ends_the_run_before_all_of_them_are_dead(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(16)
    spoil(monkeypatch, *(f"r{number}" for number in range(16)), how=not_a_number)
    with pytest.raises(StepImpossible, match="8 trajectories in a row cannot be trained on"):
        learner_of(run).run(until_idle=True)
    assert len(run.entries("dead")) == 4


def test_out_of_memory_is_avoided_by_smaller_micro_batches_and_sets_nothing_aside(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(8, micro_batch_tokens=64)
    kept, sizes = gradients.kept_rows, []

    def small(model: Any, head: Any, micro: Any) -> Tensor:
        if micro.input_ids.numel() > 14:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(micro.input_ids.numel())
        return kept(model, head, micro)

    monkeypatch.setattr(gradients, "kept_rows", small)
    learner_of(run).run(until_idle=True)
    assert set(endings(run).values()) == {"trained"}
    logged = [record.message.partition(":")[0] for record in caplog.records if "micro-batch" in record.message]
    assert logged == [f"at most {tokens} tokens in a micro-batch from now on" for tokens in (32, 16)]


def test_a_trajectory_that_kills_its_learners_is_set_aside_and_nothing_is_trained_twice(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(9)
    spoil(monkeypatch, "r5", how=fails(Killed()))
    killed = 0
    while True:
        try:
            learner_of(run).run(until_idle=True)
            break
        except Killed:
            killed += 1
            assert killed < 8, "it kills for ever"
    assert killed == 1 + run.config.liveness.max_attempts
    assert [entry["reason"] for entry in run.entries("dead")] == ["3 learners ended while trying only this trajectory"]
    assert endings(run) == {f"r{number}": "dead" if number == 5 else "trained" for number in range(9)}
    assert trained(run) == [["r0", "r1", "r2", "r3"], ["r4", "r6", "r7", "r8"]]


def test_learners_that_are_killed_for_another_reason_set_nothing_aside(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(8)
    step = torch.optim.AdamW.step
    for _ in range(6):
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            learner_of(run).run(until_idle=True)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    learner_of(run).run(until_idle=True)
    assert set(endings(run).values()) == {"trained"}
    assert run.entries("dead") == []
