"""A rollout that no worker can write: it is found and counted, its neighbours are written, and what is not a rollout's
fault ends the process. The real worker and engine on the shipped student and a real Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import Run, fenced
from shipped_engines import decoder_of, load_shipped
from transformers import PreTrainedModel

from actors.blame import Blame, EngineBroken
from actors.engine.decode import Decoder
from actors.rollout import RolloutWorker
from common.wire.weights import publish
from ops.reach.embedded import EmbeddedRedis

pytestmark = pytest.mark.slow

RIDS = [f"r{number}" for number in range(1, 9)]


class Killed(BaseException):
    """Raised where the process would have ended; nothing of it may run after that."""


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    torch.set_num_threads(1)
    return load_shipped("student")


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run], student: PreTrainedModel) -> Run:
    run = start(
        embedded_redis,
        rollout={"chunk_tokens": 4, "max_completion_length": 12, "slots": 8, "max_unscored_chunks": 1000},
        data={"max_prompt_length": 16},
        termination={"teacher_top_k": 8},
    )
    state = {name: tensor for name, tensor in student.state_dict().items() if "lm_head" not in name}
    ref = publish(run.config.run_dir / "weights", 0, lambda path: save_file(state, path))
    run.lease("learner").call(fenced("publish", 0, 0, ref.file, ref.sha256))
    for number, rid in enumerate(RIDS):
        prompt = np.array([5, 6, 10 + number // 2], dtype=np.int32)  # two rollouts of each
        run.admit(rid, seed=number, max_new_tokens=12, prompt=prompt)
    return run


def worker_of(run: Run, decoder: Decoder, name: str = "w1") -> RolloutWorker:
    return RolloutWorker(run.config, run.plane, decoder, worker=name, stop=threading.Event())


def spoil(decoder: Decoder, *rids: str, error: BaseException | None = None) -> None:
    """Whenever one of these is written, the model raises; without an `error`, its logits are not finite, and neither is
    what it left in the cache."""
    forward = decoder._model.forward

    @torch.inference_mode()
    def spoilt(rows: Any, tokens: Any, starts: Any, lengths: Any, logits_at: Any) -> Any:
        at_work = range(len(lengths)) if rows is None else rows
        slots = {decoder._slot.get(rid) for rid in rids}
        struck = [place for place, slot in enumerate(at_work) if lengths[place] and slot in slots]
        if struck and error is not None and len(logits_at):
            raise error
        logits = forward(rows, tokens, starts, lengths, logits_at)
        if struck and len(logits_at):
            logits[struck] = torch.nan
            for layer in decoder._model._cache._slot_layers:
                layer.keys[struck] = torch.nan
        return logits

    decoder._model.forward = spoilt  # type: ignore[method-assign]


def go(worker: RolloutWorker, run: Run, rids: Iterable[str] = RIDS, seconds: float = 30.0) -> None:
    """Step until all of these are written or dead."""
    deadline = time.monotonic() + seconds
    while any(run.field(rid, "finish") is None and run.field(rid, "verdict") is None for rid in rids):
        assert worker.step()
        assert time.monotonic() < deadline, "it did not come to pass"


def dead(run: Run) -> dict[str, str]:
    return {entry["rid"]: entry["reason"] for entry in run.entries("dead")}


def texts(run: Run) -> list[bytes | None]:
    return [run.field(rid, f"t:{seq}") for rid in RIDS for seq in range(3)]


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel image is available")])
@pytest.mark.parametrize("wrong", [("r5",), ("r1", "r2", "r8"), ("r1", "r2", "r3", "r4", "r6", "r8")])
def test_a_rollout_that_cannot_be_written_is_dead_after_three_attempts_and_the_others_are_written(
    run: Run, student: PreTrainedModel, wrong: tuple[str, ...], error: RuntimeError | None
) -> None:
    decoder = decoder_of(run, student)
    spoil(decoder, *wrong, error=error)
    go(worker_of(run, decoder), run)
    reason = "RuntimeError: no kernel image" if error else "FloatingPointError: the student's logits are not finite"
    assert set(dead(run)) == set(wrong)
    assert all(found.startswith(reason) for found in dead(run).values())
    assert [run.field(rid, "verdict") for rid in wrong] == [b"dead"] * len(wrong)
    assert all(run.field(rid, "finish") for rid in RIDS if rid not in wrong)
    assert run.pending("prompts") == 0


def test_rollouts_known_to_be_at_fault_do_not_count_against_the_engine_when_no_others_are_left() -> None:
    proofs: list[str] = []
    blame = Blame(lambda: proofs.append("proved"), deed="written", model="student")
    error = RuntimeError("no kernel image is available")
    for rid in RIDS[:4]:
        blame.of(rid, error)
    blame.succeeded()
    for rid in [*RIDS[:4], *RIDS[4:8]] * 3:  # four that are known, and four that are not
        blame.of(rid, error)
    assert len(proofs) == 28
    with pytest.raises(EngineBroken, match="5 rollouts in a row cannot be written, the last: RuntimeError: no kernel"):
        blame.of("r9", error)


def test_the_others_are_written_as_without_the_rollout_that_cannot_be_written(
    run: Run, student: PreTrainedModel, start: Callable[..., Run], embedded_redis: EmbeddedRedis
) -> None:
    decoder = decoder_of(run, student)
    go(worker_of(run, decoder, "calm"), run)
    calm = {rid: [run.field(rid, "length"), run.field(rid, "finish")] for rid in RIDS if rid != "r5"}
    other = start(embedded_redis, **{name: getattr(run.config, name).model_dump() for name in ("rollout", "data")},
                  termination={"teacher_top_k": 8}, name="other")  # fmt: skip
    state = {name: tensor for name, tensor in student.state_dict().items() if "lm_head" not in name}
    ref = publish(other.config.run_dir / "weights", 0, lambda path: save_file(state, path))
    other.lease("learner").call(fenced("publish", 0, 0, ref.file, ref.sha256))
    for number, rid in enumerate(RIDS):
        other.admit(rid, seed=number, max_new_tokens=12)
    spoilt = decoder_of(other, student)
    spoil(spoilt, "r5")
    go(worker_of(other, spoilt), other)
    assert {rid: [other.field(rid, "length"), other.field(rid, "finish")] for rid in calm} == calm


def test_a_failure_of_every_rollout_ends_the_process_before_one_is_dead(run: Run, student: PreTrainedModel) -> None:
    decoder = decoder_of(run, student)
    spoil(decoder, *RIDS, error=RuntimeError("no kernel image is available"))
    with pytest.raises(EngineBroken, match="5 rollouts in a row cannot be written, the last: RuntimeError: no kernel"):
        go(worker_of(run, decoder), run)
    assert dead(run) == {}


def test_a_student_that_fails_its_self_test_blames_no_rollout(run: Run, student: PreTrainedModel) -> None:
    broken: Any = deepcopy(student)
    decoder = decoder_of(run, broken)
    worker = worker_of(run, decoder)
    while not decoder.busy:
        worker.step()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(EngineBroken, match="not finite; the student fails its self-test too"):
        go(worker, run)
    assert dead(run) == {}
    assert {run.field(rid, "attempts") for rid in RIDS} == {None}


def test_out_of_memory_is_avoided_by_smaller_prefills_and_blames_no_rollout(
    run: Run, student: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = decoder_of(run, student)
    forward = decoder._model.forward

    def small(rows: Any, tokens: Any, starts: Any, lengths: Any, logits_at: Any) -> Any:
        if not len(logits_at) and tokens.size > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(rows, tokens, starts, lengths, logits_at)

    decoder._model.forward = small  # type: ignore[method-assign]
    decoder._prefill_tokens = 64
    worker = worker_of(run, decoder)
    worker.step()
    assert "at most 32 tokens in a prefill from now on" in caplog.text
    assert decoder._prefill_tokens == 32


def killed_by(run: Run, student: PreTrainedModel, poison: str, name: str) -> bool:
    """Run a worker that the system kills as soon as it writes `poison`. True if it was killed."""
    decoder = decoder_of(run, student)
    spoil(decoder, poison, error=Killed())
    worker = worker_of(run, decoder, name)
    try:
        go(worker, run)
    except Killed:
        return True
    return False


def test_a_rollout_that_kills_its_workers_dies_and_takes_no_neighbour_with_it(
    run: Run, student: PreTrainedModel
) -> None:
    killed = 0
    while killed_by(run, student, "r5", f"w{killed}"):
        killed += 1
        assert killed < 12, "it kills for ever"
        time.sleep(run.config.liveness.claim_s)
    assert dead(run) == {"r5": "3 workers ended while writing only this rollout"}
    assert all(run.field(rid, "finish") for rid in RIDS if rid != "r5")
    assert killed <= 6
    assert run.pending("prompts") == 0


def test_a_storm_of_kills_blames_no_rollout_that_can_be_written(run: Run, student: PreTrainedModel) -> None:
    """Killed before it writes anything, twenty times: no rollout is at fault."""
    for kill in range(20):
        taken = run.take(f"k{kill}", f"n{kill}", count=8, idle_ms=1)
        assert len(taken) == 8
        time.sleep(0.003)
    time.sleep(run.config.liveness.claim_s + 0.05)
    go(worker_of(run, decoder_of(run, student)), run)
    assert dead(run) == {}
    assert all(run.field(rid, "finish") for rid in RIDS)


def test_a_rollout_released_while_written_alone_counts_no_death(run: Run, student: PreTrainedModel) -> None:
    for kill in range(3):
        run.take(f"k{kill}", f"n{kill}", count=8, idle_ms=1)
        time.sleep(0.003)
    time.sleep(run.config.liveness.claim_s + 0.05)
    worker = worker_of(run, decoder_of(run, student))

    def begun() -> list[bytes]:
        return [count for rid in RIDS if (count := run.field(rid, "begun:rollout"))]

    while not begun():
        worker.step()
    assert begun() == [b"1"]
    worker.close()
    assert {run.field(rid, "begun:rollout") for rid in RIDS} == {None}
    go(worker_of(run, decoder_of(run, student)), run)
    assert dead(run) == {}
