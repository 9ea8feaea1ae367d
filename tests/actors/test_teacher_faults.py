"""A teacher that cannot score something: the rollout is found and counted, its neighbours are scored, and what is not a
rollout's fault ends the process. The real worker and engine on the shipped teacher and a real Redis."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from samples import Run, make_former_support, make_logprobs, make_support
from shipped_engines import VOCAB, load_shipped, scorer_of
from transformers import PreTrainedModel

from actors.blame import EngineBroken
from actors.engine.score import Scorer
from actors.teacher import TeacherWorker
from common.wire import scripts
from common.wire.messages import ChunkTokens, ScoreSupport, support_digest
from common.wire.scripts import ChunkAnswer
from ops.reach.embedded import EmbeddedRedis

pytestmark = pytest.mark.slow

N, K = 6, 2


class Killed(BaseException):
    """Raised where the process would have ended; nothing of it may run after that."""


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    torch.set_num_threads(1)
    return load_shipped("teacher")


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(embedded_redis, teacher={"slots": 8}, data={"max_prompt_length": 16}, termination={"teacher_top_k": K})


def worker_of(run: Run, scorer: Scorer, name: str = "t1") -> TeacherWorker:
    stop = threading.Event()
    return TeacherWorker(run.config, run.plane, scorer, vocab_size=VOCAB, stop_count=1, worker=name, stop=stop)


def text(seed: int, n: int = N) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(2, VOCAB, n)]


def write(run: Run, rid: str, tokens: list[int], *, seq: int = 0, start: int = 0, mark: float = 0.0) -> None:
    """A chunk as its writer stores it; `mark` is a difference in its log-probabilities, as another text before it makes
    one."""
    support, student = make_support(len(tokens), K), make_logprobs(len(tokens), K)
    student.support_logprobs[0, 0] -= mark
    parts = support.encode(), student.encode()
    chunk = ChunkTokens(seq, start, 0, None, "n1", support_digest(*parts), np.array(tokens, np.int32)).encode()
    length = start + len(tokens)
    reply = run.plane.call(scripts.chunk(rid, "n1", seq, chunk, *parts, run.plane.shard_of(rid), length, None))
    assert reply.word is ChunkAnswer.OK


def written(run: Run, *rids: str) -> None:
    for rid in rids:
        run.admit(rid)
    run.take(count=len(rids))
    for rid in rids:
        write(run, rid, text(int(rid[1:])))


def spoil(scorer: Scorer, *slots_of: str, error: BaseException | None = None) -> list[list[str]]:
    """Make every forward with one of these rollouts give states that are not finite, there and in the cache, or
    raise; returns the requests, call by call."""
    asked: list[list[str]] = []
    score, inner = scorer.score, scorer._model.states

    def seen(requests: Any) -> Any:
        asked.append([one.key for one in requests])
        return score(requests)

    def spoilt(rows: Any, *args: Any) -> Any:
        states = inner(rows, *args)
        if any(scorer._slot.get(rid) in rows for rid in slots_of):
            if error is not None:
                raise error
            states[[list(rows).index(scorer._slot[rid]) for rid in slots_of if scorer._slot.get(rid) in rows]] = np.nan
            for layer in scorer._model._cache._slot_layers:
                keys: Any = layer.keys
                for rid in slots_of:
                    if rid in scorer._slot:
                        with torch.inference_mode():
                            keys[scorer._slot[rid]] = np.nan
        return states

    scorer.score, scorer._model.states = seen, spoilt  # type: ignore[method-assign, assignment]
    return asked


def steps(worker: TeacherWorker, turns: int = 8) -> None:
    for _ in range(turns):
        worker.step(block_s=0.001)


def scored(run: Run, *rids: str) -> list[bytes | None]:
    return [run.field(rid, "scored") for rid in rids]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "FloatingPointError: r3: the teacher's logits are not finite"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (RuntimeError("shapes of r3\ndo not fit"), "RuntimeError: shapes of r3 do not fit"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "RuntimeError: [enforce fail]"),
    ],
    ids=["not finite", "key", "runtime", "CUDA memory", "CPU memory"],
)
def test_the_rollout_that_cannot_be_scored_dies_after_three_attempts_and_the_others_are_scored(
    run: Run, teacher: PreTrainedModel, error: Exception | None, reason: str
) -> None:
    rids = [f"r{number}" for number in range(1, 7)]
    written(run, *rids)
    scorer = scorer_of(run, teacher)
    spoil(scorer, "r3", error=error)
    steps(worker_of(run, scorer))
    assert scored(run, *rids) == [b"1", b"1", b"0", b"1", b"1", b"1"]
    assert run.field("r3", "verdict") == b"dead"
    [dead] = run.entries("dead")
    assert (dead["rid"], dead["stage"]) == ("r3", "teacher")
    assert dead["reason"].startswith(reason)
    assert run.field("r3", "attempts") == b"3"
    assert [one["ending"] for one in run.entries("finished")] == ["dead"]
    assert sum(run.pending(f"chunks:{shard}") for shard in range(run.plane.shards)) == 0


def test_values_that_are_not_finite_do_not_reach_the_next_rollout_in_the_slot(
    run: Run, teacher: PreTrainedModel
) -> None:
    written(run, "r1")
    scorer = scorer_of(run, teacher)
    worker = worker_of(run, scorer)
    spoil(scorer, "r1")
    steps(worker)
    assert run.field("r1", "verdict") == b"dead"
    written(run, *(f"r{number}" for number in range(2, 10)))
    steps(worker)
    assert scored(run, *(f"r{number}" for number in range(2, 10))) == [b"1"] * 8


def test_out_of_memory_is_avoided_by_smaller_forwards_and_blames_no_rollout(
    run: Run, teacher: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    rids = [f"r{number}" for number in range(1, 9)]
    written(run, *rids)
    scorer = scorer_of(run, teacher)
    forward, sizes = scorer._model.forward, []

    def small(rows: Any, tokens: Any, *args: Any) -> Any:
        if tokens.size > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(tokens.size)
        return forward(rows, tokens, *args)

    scorer._model.forward = small  # type: ignore[method-assign, assignment]
    steps(worker_of(run, scorer))
    assert scored(run, *rids) == [b"1"] * 8
    assert run.entries("dead") == []
    assert [run.field(rid, "attempts") for rid in rids] == [None] * 8
    assert max(sizes) <= 40
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"out of memory: at most {tokens} tokens in a forward from now on" for tokens in (128, 64, 32)
    ]


def test_a_failure_of_every_rollout_ends_the_process_before_one_is_dead(run: Run, teacher: PreTrainedModel) -> None:
    rids = [f"r{number}" for number in range(1, 9)]
    written(run, *rids)
    scorer = scorer_of(run, teacher)
    spoil(scorer, *rids, error=RuntimeError("no kernel image is available"))
    with pytest.raises(EngineBroken, match="5 rollouts in a row cannot be scored, the last: RuntimeError: no kernel"):
        steps(worker_of(run, scorer))
    assert run.entries("dead") == []


def test_a_teacher_that_fails_its_self_test_blames_no_rollout(run: Run) -> None:
    broken = load_shipped("teacher")
    written(run, "r1")
    scorer = scorer_of(run, broken)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(EngineBroken, match="not finite; the teacher fails its self-test too"):
        steps(worker_of(run, scorer))
    assert (run.field("r1", "attempts"), run.entries("dead")) == (None, [])


def killed_by(run: Run, teacher: PreTrainedModel, poison: str, name: str) -> bool:
    """Run a teacher that the system kills as soon as it scores `poison`. True if it was killed."""
    scorer = scorer_of(run, teacher)
    spoil(scorer, poison, error=Killed())
    worker = worker_of(run, scorer, name)
    try:
        for _ in range(60):
            worker.step(block_s=0.001)
            time.sleep(0.01)
    except Killed:
        return True
    return False


def test_a_rollout_that_kills_its_teachers_dies_and_takes_no_neighbour_with_it(
    run: Run, teacher: PreTrainedModel
) -> None:
    rids = [f"r{number}" for number in range(1, 9)]
    written(run, *rids)
    killed = 0
    while killed_by(run, teacher, "r5", f"t{killed}"):
        killed += 1
        assert killed < 12, "it kills for ever"
        time.sleep(run.config.liveness.claim_s)
    assert run.field("r5", "verdict") == b"dead"
    assert [entry["reason"] for entry in run.entries("dead")] == ["3 teachers ended while scoring only this rollout"]
    assert scored(run, *rids) == [b"0" if rid == "r5" else b"1" for rid in rids]
    assert killed <= 6
    assert sum(run.pending(f"chunks:{shard}") for shard in range(run.plane.shards)) == 0


def test_a_storm_of_kills_blames_no_rollout_that_can_be_scored(run: Run, teacher: PreTrainedModel) -> None:
    """Killed before it scores anything, twenty times: no rollout is at fault."""
    rids = [f"r{number}" for number in range(1, 9)]
    written(run, *rids)
    for kill in range(20):
        run.plane.claim_chunks(f"k{kill}", idle_s=0.0, count=32)
        run.plane.read("teacher", f"k{kill}", [f"chunks:{shard}" for shard in range(4)], count=32, block_s=0)
    time.sleep(run.config.liveness.claim_s + 0.05)
    steps(worker_of(run, scorer_of(run, teacher)), turns=20)
    assert scored(run, *rids) == [b"1"] * 8
    assert run.entries("dead") == []


# --- the cache and the text ---


def alone(run: Run, teacher: PreTrainedModel, rid: str, seq: int = 1) -> np.ndarray[Any, Any]:
    """The scores of a rollout's chunk by a teacher that has seen nothing before."""
    name, fields = run.key(f"rollout:{rid}"), (f"d:{seq}", f"q:{seq}")
    held = run.client.hmget(name, *fields)
    run.client.hdel(name, *fields)
    run.client.hset(name, f"s:{seq}", make_logprobs(N, K).encode())
    run.client.xadd(run.key(f"chunks:{run.plane.shard_of(rid)}"), {"rid": rid, "seq": seq})
    steps(worker_of(run, scorer_of(run, teacher), "cold"), turns=2)
    scores = ScoreSupport.decode(run.field(rid, f"q:{seq}") or b"").sampled_logprobs
    run.client.hset(name, mapping=dict(zip(fields, held, strict=True)))
    return scores


def test_a_cache_of_another_run_is_not_scored_on(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], teacher: PreTrainedModel, run: Run
) -> None:
    """The engine is kept between runs, and the next run has the same ids and prompts."""
    written(run, "r1")
    scorer = scorer_of(run, teacher)
    steps(worker_of(run, scorer), turns=2)
    assert scored(run, "r1") == [b"1"]
    other = start(
        embedded_redis, teacher={"slots": 8}, data={"max_prompt_length": 16}, termination={"teacher_top_k": K}
    )
    other.admit("r1")
    other.take()
    write(other, "r1", text(99))
    steps(worker_of(other, scorer_of(other, teacher), "elsewhere"), turns=2)
    write(other, "r1", text(98), seq=1, start=N)
    steps(worker_of(other, scorer, "t1"), turns=2)
    got = ScoreSupport.decode(other.field("r1", "q:1") or b"").sampled_logprobs
    assert np.allclose(got, alone(other, teacher, "r1"), atol=1e-4)


def test_a_chunk_that_a_former_version_wrote_is_scored_alike(run: Run, teacher: PreTrainedModel) -> None:
    """A run goes on through an upgrade; support and log-probabilities were one record."""
    worker = worker_of(run, scorer_of(run, teacher))
    written(run, "r1", "r2")
    for rid in ("r1", "r2"):
        tokens = ChunkTokens.decode(run.field(rid, "t:0") or b"")
        chunk = replace(tokens, tokens=np.array(text(7), np.int32))
        if rid == "r2":
            former = make_former_support(N, K).encode()
            chunk = replace(chunk, digest=hashlib.blake2b(former, digest_size=16).digest())
            run.client.hset(run.key("rollout:r2"), "p:0", former)
            run.client.hdel(run.key("rollout:r2"), "s:0")
        run.client.hset(run.key(f"rollout:{rid}"), "t:0", chunk.encode())
    steps(worker, turns=2)
    for field in ("d:0", "q:0"):
        assert run.field("r1", field)
        assert run.field("r2", field) == run.field("r1", field)


def test_a_chunk_that_redis_lost_and_that_was_written_again_is_not_scored_on_the_old_one(
    run: Run, teacher: PreTrainedModel
) -> None:
    """An append-only file may lose its last second: the teacher has scored a chunk that Redis lost."""
    written(run, "r1")
    scorer = scorer_of(run, teacher)
    worker = worker_of(run, scorer)
    steps(worker, turns=2)
    name = run.key("rollout:r1")
    run.client.hset(name, mapping={"chunks": 0, "scored": 0, "length": 0})
    run.client.hdel(name, "t:0", "p:0", "s:0", "d:0", "q:0")
    write(run, "r1", text(50))
    steps(worker_of(run, scorer_of(run, teacher), "elsewhere"), turns=2)
    write(run, "r1", text(51), seq=1, start=N)
    steps(worker, turns=2)
    got = ScoreSupport.decode(run.field("r1", "q:1") or b"").sampled_logprobs
    assert np.allclose(got, alone(run, teacher, "r1"), atol=1e-4)
