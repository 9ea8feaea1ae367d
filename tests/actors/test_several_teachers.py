"""Several teachers on a real Redis: each scores its own rollouts only, and each has a threshold of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Run, make_verdict
from shipped_engines import STUDENT, TEACHER, VOCAB, decoder_of, scorer_of

from actors.arbiter import Arbiter
from actors.feeder import Feeder
from common.metrics import REGISTRY
from common.wire import scripts
from common.wire.messages import ChunkSupport, ChunkTokens, Ints, RolloutHead, ScoreSupport
from ops.reach.embedded import EmbeddedRedis

TEACHERS: dict[str, Any] = {
    "teacher": None,
    "teachers": {"math": {"model": "a"}, "code": {"model": "b"}},
    "data": {"teacher_key": "kind", "max_prompt_length": 16},
}
CHUNK, LENGTH = 8, 32


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Callable[..., Run]:
    return lambda **overrides: start(embedded_redis, **TEACHERS, **overrides)


@pytest.fixture
def run(begin: Callable[..., Run]) -> Run:
    return begin()


# --- streams and thresholds -------------------------------------------------------------------------------------------


def test_each_teacher_has_streams_of_its_own_and_one_without_a_name_has_those_of_before(
    run: Run, embedded_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    assert [stream for stream, group in run.plane.groups if group == "teacher"] == [
        *("chunks:math:0", "chunks:math:1", "chunks:math:2", "chunks:math:3"),
        *("chunks:code:0", "chunks:code:1", "chunks:code:2", "chunks:code:3"),
    ]
    alone = start(embedded_redis)
    assert [stream for stream, group in alone.plane.groups if group == "teacher"] == [f"chunks:{n}" for n in range(4)]
    run.admit("r1", teacher="code")
    assert run.lane("r1") == f"code:{run.plane.shard_of('r1')}"


def test_a_chunk_goes_to_the_stream_of_its_teacher_and_its_score_takes_it_off(run: Run) -> None:
    for rid, teacher in (("r1", "math"), ("r2", "code")):
        run.admit(rid, teacher=teacher)
        run.take()
        assert run.chunk(rid)[0] == b"ok"
        stream = f"chunks:{teacher}:{run.plane.shard_of(rid)}"
        assert run.entries(stream) == [{"rid": rid, "seq": "0"}]
        assert run.score(rid) == b"ok"
        assert run.entries(stream) == []


def test_a_rollout_is_judged_by_the_threshold_of_its_teacher(run: Run) -> None:
    """The first score fixes the threshold in force for the rollout's own teacher; minima go to its own buffer."""
    for rid, teacher in (("r1", "math"), ("r2", "code")):
        run.admit(rid, teacher=teacher)
    run.take()
    for rid, teacher, number in (("r1", "math", "0.5"), ("r2", "code", "2.0")):
        run.chunk(rid, finish="eos")
        run.score(rid)
        assert run.verdict(rid, minimum=number, threshold=number, teacher=teacher) == b"ok"
    assert (run.plane.minima("math"), run.plane.minima("code"), run.plane.minima()) == ([0.5], [2.0], [])
    assert [run.plane.threshold(name) for name in ("math", "code", "")] == [b"0.5", b"2.0", b"inactive"]
    for rid, teacher, number in (("r3", "code", b"2.0"), ("r4", "math", b"0.5")):
        run.admit(rid, teacher=teacher)
        run.take()
        run.chunk(rid)
        run.score(rid)
        assert run.field(rid, "threshold") == number


def test_the_arbiter_calibrates_each_teacher_by_its_own_rollouts(run: Run) -> None:
    """Divergences of one are a hundred times those of the other: a shared quantile would cut all of one and nothing of
    the other."""
    quantile = {"math": [0.01 * n for n in range(1, 9)], "code": [1.0 * n for n in range(1, 9)]}
    number = 0
    for teacher, minima in quantile.items():
        for minimum in minima:
            rid, number = f"r{number}", number + 1
            run.admit(rid, teacher=teacher, arm="control")
            run.take()
            run.chunk(rid, tokens=[1] * 4, finish="eos")
            run.score(rid, values=[minimum] * 4)
    arbiter = Arbiter(run.config, run.plane, threading.Event())
    arbiter.run(until_idle=True)
    for teacher, minima in quantile.items():
        assert sorted(run.plane.minima(teacher)) == pytest.approx(minima)
        least, most = minima[0], minima[-1]
        assert least < float(run.plane.threshold(teacher)) < most
        assert arbiter.threshold_of(teacher) == float(run.plane.threshold(teacher))
        labels = {"teacher": teacher}
        assert REGISTRY.get_sample_value("katana_kat_buffer_size", labels) == len(minima)
        assert REGISTRY.get_sample_value("katana_kat_threshold_nats", labels) == float(run.plane.threshold(teacher))
    other = Arbiter(run.config, run.plane, threading.Event())  # it loads both buffers
    other.run(until_idle=True)
    assert other.threshold_of("math") == arbiter.threshold_of("math")


def test_a_rollout_of_a_teacher_that_the_run_does_not_have_is_given_up_by_the_arbiter(run: Run) -> None:
    run.admit("r1", teacher="bio")
    run.take()
    run.client.hset(run.key("rollout:r1"), mapping={"t:0": b"", "d:0": b"", "chunks": 1})
    run.client.xadd(run.key("scores"), {"rid": "r1"})
    arbiter = Arbiter(run.config, run.plane, threading.Event())
    arbiter.open()
    for _ in range(run.config.liveness.max_attempts):
        arbiter.step(block_s=0.01)
    arbiter.close()
    (letter,) = run.entries("dead")
    assert letter["stage"] == "arbiter" and "head.teacher: 'bio' is no teacher of this run" in letter["reason"]


# --- the feeder -------------------------------------------------------------------------------------------------------


class Rows:
    """Rows of two teachers, in turn; of math every answer is right."""

    def prompt(self, problem: int) -> Ints:
        return np.array([1, 2, 3], np.int32)

    def teacher(self, problem: int) -> str:
        return ("math", "code")[problem % 2]

    def judge(self, problem: int, tokens: Ints) -> bool:
        return problem % 2 == 0


def test_the_feeder_names_each_rollouts_teacher_in_its_head_its_line_and_the_metrics(run: Run) -> None:
    feeder = Feeder(run.config, run.plane, Rows(), threading.Event())
    feeder.open()
    while len(run.plane.open_rollouts()) < 4:
        feeder.step(block_s=0.01)
    heads = {rid: RolloutHead.decode(run.field(rid, "head") or b"") for rid in run.plane.open_rollouts()}
    assert {head.scored_by for head in heads.values()} == {"math", "code"}
    assert all(head.scored_by == Rows().teacher(head.problem) for head in heads.values())
    run.take(count=100)
    rids = sorted(heads)[:4]
    run.teachers |= {rid: head.scored_by for rid, head in heads.items()}
    for rid in rids:
        run.chunk(rid, finish="eos")
    run.plane.seen("t1", role="teacher", teacher="code")
    feeder._housekeeping_at = 0.0
    feeder.step(block_s=0.01)
    of_code = sum(heads[rid].scored_by == "code" for rid in rids)
    value = REGISTRY.get_sample_value
    assert value("katana_stream_outstanding", {"stream": "chunks", "teacher": "code"}) == of_code > 0
    assert value("katana_stream_outstanding", {"stream": "chunks", "teacher": "math"}) == 4 - of_code > 0
    assert value("katana_workers_live", {"role": "teacher", "teacher": "code"}) == 1
    assert value("katana_workers_live", {"role": "teacher", "teacher": "math"}) == 0
    for rid in rids:
        run.score(rid)
        verdict = make_verdict(rid, problem=heads[rid].problem, train=0).encode()
        given = run.score_entries()
        run.by("arbiter", scripts.verdict(rid, verdict, 0, False, None, 4, None, given, heads[rid].scored_by))
        run.raw(scripts.count(rid, "n1", 3))
    while feeder.step(block_s=0.01):
        pass
    feeder.close()
    lines = list(feeder._folder.rollouts())
    assert {line.rid: line.teacher for line in lines} == {rid: heads[rid].scored_by for rid in rids}


def test_a_deterministic_batch_has_the_threshold_of_each_rollouts_teacher(begin: Callable[..., Run]) -> None:
    run = begin(deterministic=True, learner={"batch_size": 4})
    run.client.set(run.key("threshold:code"), "0.5")
    feeder = Feeder(run.config, run.plane, Rows(), threading.Event())
    feeder.open()
    feeder.step(block_s=0.01)
    feeder.close()
    for rid in run.plane.open_rollouts():
        code = RolloutHead.decode(run.field(rid, "head") or b"").scored_by == "code"
        assert run.field(rid, "threshold") == (b"0.5" if code else b"inactive")


# --- the workers, with models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student, and two teachers that disagree about every mark: the shipped one, and it in the other dialect."""
    import torch

    from actors.engine.models import load_model
    from ops.tasks.pretrain import shift

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shifted")
    shift(TEACHER, folder)
    of: dict[str, Path] = {"student": STUDENT, "math": TEACHER, "code": folder}
    return {name: load_model(one, dtype="float32", device="cpu", vocab_size=VOCAB) for name, one in of.items()}


@pytest.fixture
def written(begin: Callable[..., Run], models: dict[str, Any]) -> Run:
    """A run with a rollout of each teacher, of which the first chunk is written by the real rollout worker."""
    from safetensors.torch import save_file

    from actors.rollout import RolloutWorker
    from common.wire.weights import publish

    run = begin(
        rollout={"chunk_tokens": CHUNK, "max_completion_length": LENGTH, "slots": 4, "max_unscored_chunks": 1},
        termination={"teacher_top_k": 8},
    )
    own = {name: one for name, one in models["student"].state_dict().items() if "lm_head" not in name}
    ref = publish(run.config.run_dir / "weights", 0, lambda path: save_file(own, path))
    run.by("learner", scripts.publish(ref.version, 0, ref.file, ref.sha256))
    for rid, teacher in (("r1", "math"), ("r2", "code"), ("r3", "bio")):
        run.admit(rid, teacher=teacher, prompt=np.array([5, 11, 6, 15], np.int32), seed=3, max_new_tokens=LENGTH)
    writer = RolloutWorker(
        run.config, run.plane, decoder_of(run, models["student"]), worker="w1", stop=threading.Event()
    )
    assert writer.open()
    deadline = time.monotonic() + 60
    while any(int(run.field(rid, "chunks") or 0) < 1 for rid in ("r1", "r2")) or not run.entries("dead"):
        writer.step()
        assert time.monotonic() < deadline
    return run


def worker(run: Run, models: dict[str, Any], teacher: str, name: str) -> Any:
    from actors.teacher import TeacherWorker

    return TeacherWorker(
        run.config,
        run.plane,
        scorer_of(run, models[teacher]),
        vocab_size=VOCAB,
        stop_count=1,
        worker=name,
        stop=threading.Event(),
        teacher=teacher,
    )


@pytest.mark.slow
def test_each_rollout_is_scored_by_its_own_teacher_and_one_of_an_unknown_teacher_by_none(
    written: Run, models: dict[str, Any]
) -> None:
    import torch

    from actors.engine import ScoreRequest

    assert {(letter["rid"], letter["stage"]) for letter in written.entries("dead")} == {("r3", "rollout")}
    assert "head.teacher: 'bio'; the run has math, code" in written.entries("dead")[0]["reason"]
    for teacher, own, other in (("math", "r1", "r2"), ("code", "r2", "r1")):
        before = written.field(other, "scored")
        assert worker(written, models, teacher, f"t-{teacher}").step(block_s=0.1)
        assert (written.field(own, "scored"), written.field(other, "scored")) == (b"1", before)
    for rid, teacher, wrong in (("r1", "math", "code"), ("r2", "code", "math")):
        head = RolloutHead.decode(written.field(rid, "head") or b"")
        chunk = ChunkTokens.decode(written.field(rid, "t:0") or b"")
        support = ChunkSupport.decode(written.field(rid, "p:0") or b"")
        stored = ScoreSupport.decode(written.field(rid, "q:0") or b"")
        request = ScoreRequest(rid, head.prompt, 0, chunk.tokens, support.support_ids)
        again, others = (scorer_of(written, models[name]).score([request])[0] for name in (teacher, wrong))
        np.testing.assert_allclose(stored.sampled_logprobs, again.sampled, atol=1e-5)
        assert np.abs(stored.sampled_logprobs - others.sampled).max() > 1
        # And by transformers alone: the log-probabilities of the tokens after the prompt, by its own model.
        ids = torch.tensor([[*head.prompt.tolist(), *chunk.tokens.tolist()]])
        with torch.inference_mode():
            logits = models[teacher](input_ids=ids).logits[0, len(head.prompt) - 1 : -1].double()
        plain = logits.log_softmax(-1).gather(-1, torch.tensor(chunk.tokens.tolist())[:, None])[:, 0].numpy()
        np.testing.assert_allclose(stored.sampled_logprobs, plain, atol=1e-4)


@pytest.mark.slow
def test_only_workers_of_the_same_teacher_take_over_what_a_dead_one_held(written: Run, models: dict[str, Any]) -> None:
    for teacher in ("math", "code"):
        streams = written.plane.chunk_streams(teacher)
        assert written.plane.read("teacher", f"dead-{teacher}", streams, count=10, block_s=0)
    time.sleep(written.config.liveness.claim_s + 0.2)
    heir = worker(written, models, "code", "heir")
    deadline = time.monotonic() + 20
    while written.field("r2", "scored") != b"1":
        heir._claim_at = 0.0
        heir.step(block_s=0.05)
        assert time.monotonic() < deadline
    for _ in range(10):
        heir._claim_at = 0.0
        heir.step(block_s=0.01)
    assert written.field("r1", "scored") == b"0"
    assert written.pending(f"chunks:{written.lane('r1')}") == 1


@pytest.mark.slow
def test_a_notice_in_the_stream_of_another_teacher_is_a_dead_letter_and_costs_the_rollout_nothing(
    written: Run, models: dict[str, Any]
) -> None:
    wrong = f"chunks:math:{written.plane.shard_of('r2')}"
    written.client.xadd(written.key(wrong), {"rid": "r2", "seq": 0})
    math = worker(written, models, "math", "t-math")
    while math.step(block_s=0.05):
        pass
    assert written.entries(wrong) == []
    letters = [letter for letter in written.entries("dead") if letter["stage"] == "chunks"]
    assert [letter["reason"] for letter in letters] == ["a chunk of teacher code in the stream of teacher math"]
    assert (written.field("r2", "scored"), written.field("r2", "attempts")) == (b"0", None)
    assert worker(written, models, "code", "t-code").step(block_s=0.1)
    assert written.field("r2", "scored") == b"1"


@pytest.mark.slow
def test_the_roster_of_a_teacher_has_its_own_workers_only(written: Run, models: dict[str, Any]) -> None:
    """All shards of a teacher belong to its one worker, however many the other has."""
    workers = [worker(written, models, teacher, name) for teacher, name in (("math", "m1"), ("code", "c1"))]
    for _ in range(2):
        for one in workers:
            one._report_alive()
    assert [one._roster.names for one in workers] == [["m1"], ["c1"]]
    for one in workers:
        one._wait_for_own(1, 0.0)
        assert one._mine == list(range(written.plane.shards))
    written.plane.gone("m1", role="teacher", streams=written.plane.chunk_streams("math"), teacher="math")
    assert [written.client.zcard(written.key(f"roster:teacher:{name}")) for name in ("math", "code")] == [0, 1]
