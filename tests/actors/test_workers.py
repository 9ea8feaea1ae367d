"""The real rollout and teacher workers on the shipped tiny models and a real Redis, driven step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import Run, fenced, make_verdict, write_whole
from shipped_engines import STOPS, VOCAB, decoder_of, load_shipped, scorer_of
from transformers import PreTrainedModel

from actors.engine import Decoder, Scored, Scorer, ScoreRequest
from actors.rollout import RolloutWorker
from actors.teacher import TeacherWorker, rendezvous
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    MessageError,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
)
from common.wire.weights import publish
from learner.intake import read_trajectory
from ops.reach.embedded import EmbeddedRedis

pytestmark = pytest.mark.slow

PROMPT = np.array([5, 11, 6, 15], np.int32)
CHUNK, LENGTH = 8, 48


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    torch.set_num_threads(1)
    return load_shipped("student")


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return load_shipped("teacher")


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(
        embedded_redis,
        rollout={"chunk_tokens": CHUNK, "max_completion_length": LENGTH, "slots": 4, "max_unscored_chunks": 2},
        teacher={"slots": 8},
        data={"max_prompt_length": 16},
        termination={"teacher_top_k": 8},
    )


def announce(run: Run, model: PreTrainedModel, version: int, *, change: float = 0.0, step: int = 0) -> Path:
    """Publish the student's weights, all of them moved by `change`, as the learner would."""
    own = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}  # that one is tied
    state = {name: (tensor + change).contiguous() for name, tensor in own.items()}
    folder = run.config.run_dir / "weights"
    ref = publish(folder, version, lambda path: save_file(state, path))
    run.lease("learner").call(fenced("publish", ref.version, step, ref.file, ref.sha256))
    return folder / ref.file


class Clock:
    """The clock of the writers. The test can make timed work due."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s

    def all_is_due(self) -> None:
        self.ahead_s += 10.0


CLOCK = Clock()


def rollout_worker(run: Run, model: PreTrainedModel, name: str = "w1", decoder: Decoder | None = None) -> RolloutWorker:
    decoder = decoder or decoder_of(run, model)
    return RolloutWorker(run.config, run.plane, decoder, worker=name, stop=threading.Event(), clock=CLOCK)


def teacher_worker(run: Run, model: PreTrainedModel, name: str = "t1", scorer: Scorer | None = None) -> TeacherWorker:
    return TeacherWorker(
        run.config,
        run.plane,
        scorer or scorer_of(run, model),
        vocab_size=VOCAB,
        stop_count=1,
        worker=name,
        stop=threading.Event(),
    )


def step_until(worker: RolloutWorker, until: Callable[[], bool], seconds: float = 20.0) -> None:
    """Step the worker. A round trip is due at every step, however slow the last one was: chunks are sent one by one."""
    deadline = time.monotonic() + seconds
    while not until():
        CLOCK.ahead_s += 0.5
        assert worker.step()
        assert time.monotonic() < deadline, "it did not come to pass"


def stored(run: Run, rid: str) -> list[ChunkTokens]:
    record = run.plane.rollout(rid)
    return [ChunkTokens.decode(record[b"t:%d" % seq]) for seq in range(int(record[b"chunks"]))]


def tokens_of(run: Run, rid: str) -> list[int]:
    return [int(token) for chunk in stored(run, rid) for token in chunk.tokens]


def wrote(run: Run, rid: str, chunks: int) -> Callable[[], bool]:
    return lambda: int(run.field(rid, "chunks") or 0) >= chunks


def admit(run: Run, rid: str, seed: int) -> None:
    assert run.admit(rid, prompt=PROMPT, seed=seed, max_new_tokens=LENGTH) == b"ok"


def long_seed(run: Run, model: PreTrainedModel) -> int:
    """A seed whose rollout is at least five chunks long: found by writing."""
    decoder = decoder_of(run, model)
    for seed in range(100):
        decoder.add("probe", PROMPT, seed=seed, max_new_tokens=LENGTH)
        while not (closed := decoder.step()) or closed[0].start < 4 * CHUNK:
            if closed and closed[0].finish:
                break
        if "probe" in decoder.busy:
            decoder.remove("probe")
            return seed
    raise AssertionError("no long rollout among 100 seeds")


def whole_text(model: PreTrainedModel, run: Run, seed: int) -> list[int]:
    decoder = decoder_of(run, model)
    decoder.add("whole", PROMPT, seed=seed, max_new_tokens=LENGTH)
    tokens: list[int] = []
    while decoder.busy:
        for chunk in decoder.step():
            tokens += [int(token) for token in chunk.tokens]
    return tokens


def test_a_rollout_is_never_more_than_max_unscored_chunks_ahead_of_the_teacher(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer, scorer = rollout_worker(run, student), teacher_worker(run, teacher)
    step_until(writer, wrote(run, "r1", 2))
    for _ in range(30):
        assert writer.step()
    assert run.field("r1", "chunks") == b"2"
    assert scorer.step()
    step_until(writer, wrote(run, "r1", 4))
    for _ in range(30):
        assert writer.step()
    assert run.field("r1", "chunks") == b"4"


def test_a_stop_takes_effect_at_the_next_chunk_and_the_writer_reports_its_count(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    admit(run, "r2", seed)
    announce(run, student, 0)
    writer, scorer = rollout_worker(run, student), teacher_worker(run, teacher)
    step_until(writer, wrote(run, "r1", 1))
    assert scorer.step()
    written = int(run.field("r1", "length") or 0)
    assert run.verdict("r1", stop=True) == b"ok"
    for _ in range(CHUNK + 2):
        writer.step()
        time.sleep(0.002)
    counts = [entry for entry in run.entries("finished") if entry["kind"] == "count"]
    assert [entry["rid"] for entry in counts] == ["r1"]
    assert written <= int(counts[0]["generated"]) <= written + CHUNK
    assert int(run.field("r1", "length") or 0) == written, "a chunk was stored after the verdict"
    assert "r1" not in writer.writing


def test_new_weights_close_open_chunks_and_every_chunk_names_its_version(run: Run, student: PreTrainedModel) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    announce(run, student, 0)
    decoder = decoder_of(run, student)
    writer = rollout_worker(run, student, decoder=decoder)
    step_until(writer, lambda: decoder.decoded_tokens >= 3)
    announce(run, student, 1)
    while writer.version == 0 and decoder.decoded_tokens < CHUNK:
        CLOCK.all_is_due()  # look at the pointer now; the weights are read beside the writing
        time.sleep(0.02)
        writer.step()
    step_until(writer, wrote(run, "r1", 2))
    first, second = stored(run, "r1")[:2]
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert len(first.tokens) < CHUNK
    assert second.start == len(first.tokens)


def test_weights_with_another_digest_are_refused_and_writing_continues(run: Run, student: PreTrainedModel) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer = rollout_worker(run, student)
    step_until(writer, wrote(run, "r1", 1))
    path = announce(run, student, 1)
    path.write_bytes(path.read_bytes()[:-1000])
    CLOCK.all_is_due()
    step_until(writer, wrote(run, "r1", 2))
    assert {chunk.policy_version for chunk in stored(run, "r1")} == {0}


@pytest.mark.slow
def test_another_worker_continues_from_the_last_stored_chunk_with_the_same_draws(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    seed = long_seed(run, student)
    expected = whole_text(student, run, seed)
    admit(run, "r1", seed)
    announce(run, student, 0)
    silent = rollout_worker(run, student, "silent")
    step_until(silent, wrote(run, "r1", 1))
    for _ in range(3):
        silent.step()  # an open chunk that will be lost
    time.sleep(run.config.liveness.claim_s + 0.1)
    other, scorer = rollout_worker(run, student, "other"), teacher_worker(run, teacher)
    deadline = time.monotonic() + 20
    while run.field("r1", "finish") is None:
        other.step()
        scorer.step(block_s=0.001)
        assert time.monotonic() < deadline
    assert tokens_of(run, "r1") == expected
    # The former owner learns of it, and frees its slot without harm.
    silent.step()
    CLOCK.all_is_due()
    silent.step()
    assert silent.writing == ()
    assert tokens_of(run, "r1") == expected


def test_a_closing_worker_releases_its_rollouts_and_the_next_one_loses_no_token(
    run: Run, student: PreTrainedModel
) -> None:
    seed = long_seed(run, student)
    expected = whole_text(student, run, seed)
    admit(run, "r1", seed)
    announce(run, student, 0)
    decoder = decoder_of(run, student)
    first = rollout_worker(run, student, "first", decoder)
    step_until(first, lambda: decoder.decoded_tokens >= 5)
    first.close()
    assert tokens_of(run, "r1") == expected[:5]
    assert run.field("r1", "owner") is None
    second = rollout_worker(run, student, "second")
    step_until(second, wrote(run, "r1", 2))  # at once, without waiting for the claim time
    assert tokens_of(run, "r1") == expected[: 5 + CHUNK]
    assert run.field("r1", "claims") is None, "being handed back is no failure"


@pytest.mark.parametrize("viewed", [False, True])
def test_scores_equal_a_plain_forward_also_after_another_teacher_rebuilds_the_cache(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel, viewed: bool
) -> None:
    feeder = run.config.feeder.model_copy(update={"record_views": viewed})
    run = replace(run, config=run.config.model_copy(update={"feeder": feeder}))
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer, one, two = rollout_worker(run, student), teacher_worker(run, teacher), teacher_worker(run, teacher, "t2")
    students: dict[int, ChunkLogprobs] = {}
    for number, scorer in enumerate((one, two, one), start=1):
        step_until(writer, wrote(run, "r1", number))
        for seq in range(int(run.field("r1", "chunks") or 0)):  # they leave with the score
            if stored := run.field("r1", f"s:{seq}"):
                students[seq] = ChunkLogprobs.decode(stored)
        while int(run.field("r1", "scored") or 0) < number:
            scorer.step(block_s=0.01)
    record = run.plane.rollout("r1")
    tokens = np.array(tokens_of(run, "r1"))
    network: Any = teacher
    with torch.no_grad():
        text = torch.from_numpy(np.concatenate([PROMPT, tokens]).astype(np.int64))[None]
        log_q = network(text).logits[0].double().log_softmax(-1).numpy()
    place = len(PROMPT) - 1
    for seq in range(int(record[b"scored"])):
        chunk, support = ChunkTokens.decode(record[b"t:%d" % seq]), ChunkSupport.decode(record[b"p:%d" % seq])
        scores, student = ScoreSupport.decode(record[b"q:%d" % seq]), students[seq]
        assert b"s:%d" % seq not in record, "nobody reads it any more"
        divergence = ScoreDivergence.decode(record[b"d:%d" % seq]).divergence
        for row, token in enumerate(chunk.tokens):
            q = log_q[place + chunk.start + row]
            ids = np.array([STOPS[0], *support.support_ids[row]])
            outside = np.setdiff1d(np.arange(VOCAB), ids)
            assert np.allclose(scores.teacher_logprobs[row], q[ids], atol=1e-4)
            assert scores.sampled_logprobs[row] == pytest.approx(q[token], abs=1e-4)
            p, q_tail = np.exp(student.support_logprobs[row].astype(float)), np.exp(q[outside]).sum()
            assert student.tail_logprobs is not None
            p_tail = np.exp(float(student.tail_logprobs[row]))
            expected = (p * (np.log(p) - q[ids])).sum() + p_tail * (np.log(p_tail) - np.log(q_tail))
            assert divergence[row] == pytest.approx(expected, abs=2e-4, rel=1e-3)
            if viewed:
                view = ScoreView.decode(record[b"v:%d" % seq])
                entropy = -(p * np.log(p)).sum() - p_tail * np.log(p_tail)
                assert view.entropy[row] == pytest.approx(entropy, abs=1e-5)
                assert view.view[1:, row].tolist() == [support.rollout_logprobs[row], scores.sampled_logprobs[row]]
        assert (b"v:%d" % seq in record) == viewed


# --- deterministic ---


@pytest.fixture
def exact(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    return start(
        embedded_redis,
        deterministic=True,
        rollout={"chunk_tokens": CHUNK, "max_completion_length": LENGTH, "slots": 3, "max_unscored_chunks": 2},
        teacher={"slots": 2},
        data={"max_prompt_length": 16},
        termination={"teacher_top_k": 8},
    )


def admit_for(run: Run, rid: str, seed: int, step: int) -> None:
    assert run.admit(rid, prompt=PROMPT, seed=seed, max_new_tokens=LENGTH, step=step) == b"ok"


def on_record(run: Run, rid: str) -> list[tuple[bytes | None, ...]]:
    """The stored training data, chunk by chunk, without writer and version."""
    record = run.plane.rollout(rid)
    return [
        (one.tokens.tobytes(), *(record.get(b"%s:%d" % (kind, one.seq)) for kind in (b"p", b"q", b"d")))
        for one in stored(run, rid)
    ]


def test_stops_restarts_and_other_teachers_change_no_bit_in_deterministic_mode(
    exact: Run, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    seed = long_seed(exact, student)
    announce(exact, student, 0)
    for rid in ("r1", "r2", "r3"):
        admit_for(exact, rid, seed, step=0)
    writer, scorer = rollout_worker(exact, student, "one"), teacher_worker(exact, teacher)
    while any(exact.field(rid, "finish") is None for rid in ("r1", "r2", "r3")):
        writer.step()
        scorer.step(block_s=0.001)
    while scorer.step(block_s=0.001):
        pass
    expected = on_record(exact, "r1")
    assert len(expected) >= 5
    assert all(None not in chunk for chunk in expected)
    assert on_record(exact, "r2") == on_record(exact, "r3") == expected

    admit_for(exact, "r4", seed, step=0)
    for turns in range(3, 60, 7):  # stopped in the middle of chunks, in prefill, while held
        if exact.field("r4", "finish") is not None:
            break
        # The weights are announced again, as by a learner that was started again.
        announce(exact, student, turns)
        writer = rollout_worker(exact, student, f"w{turns}")
        admit_for(exact, f"other{turns}", turns, step=0)
        assert writer.open()
        for _ in range(turns):
            writer.step()
        writer.close()
        fresh = teacher_worker(exact, teacher, f"t{turns}")
        for _ in range(turns % 4):
            fresh.step(block_s=0.001)
    else:
        raise AssertionError("r4 was never written to its end")
    while scorer.step(block_s=0.001):
        pass
    assert on_record(exact, "r4") == expected


def test_a_rollout_waits_for_the_weights_of_its_step(exact: Run, student: PreTrainedModel) -> None:
    seed = long_seed(exact, student)
    announce(exact, student, 5, step=1)
    writer = rollout_worker(exact, student)
    admit_for(exact, "r1", seed, step=1)
    step_until(writer, wrote(exact, "r1", 1))
    # Weights of a learner that went back are not taken while what is written is not theirs.
    announce(exact, student, 6, step=0, change=0.5)
    admit_for(exact, "r2", seed, step=2)
    for _ in range(20):
        CLOCK.all_is_due()
        writer.step()
    assert exact.field("r2", "owner") is None
    assert int(exact.field("r2", "chunks") or 0) == 0
    announce(exact, student, 7, step=2, change=0.5)
    exact.plane.fail("r1", "rollout", "as if judged: r1 is of an earlier step", max_attempts=1)
    CLOCK.all_is_due()
    step_until(writer, wrote(exact, "r2", 1))
    assert {chunk.policy_version for chunk in stored(exact, "r1")} == {5}
    assert {chunk.policy_version for chunk in stored(exact, "r2")} == {7}
    assert exact.field("r2", "claims") is None, "being handed back is no failure"
    assert tokens_of(exact, "r2")[:CHUNK] != tokens_of(exact, "r1")[:CHUNK]


def test_a_poisoned_chunk_is_given_up_after_three_attempts_and_the_rest_is_scored(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    admit(run, "r2", seed)
    announce(run, student, 0)
    writer, scorer = rollout_worker(run, student), teacher_worker(run, teacher)
    step_until(writer, lambda: wrote(run, "r1", 1)() and wrote(run, "r2", 1)())
    run.client.hset(run.key("rollout:r1"), "p:0", b"\xc1 not a support")
    for _ in range(6):
        scorer.step(block_s=0.001)
    dead = run.entries("dead")
    assert [(entry["rid"], entry["stage"]) for entry in dead] == [("r1", "teacher")]
    assert run.field("r1", "verdict") == b"dead"
    assert int(run.field("r2", "scored") or 0) >= 1
    assert run.pending(f"chunks:{run.plane.shard_of('r1')}") == 0
    endings = [entry for entry in run.entries("finished") if entry["kind"] == "ending"]
    assert [(entry["rid"], entry["ending"]) for entry in endings] == [("r1", "dead")]


def beyond_the_vocabulary(data: bytes) -> bytes:
    chunk = ChunkTokens.decode(data)
    return replace(chunk, tokens=np.full_like(chunk.tokens, 1 << 30)).encode()


@pytest.mark.parametrize("breaking", [lambda data: data[:-3], beyond_the_vocabulary], ids=["truncated", "out of range"])
def test_a_chunk_broken_after_its_score_is_given_up_by_a_cold_teacher_and_the_rest_is_scored(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel, breaking: Callable[[bytes], bytes]
) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    admit(run, "r2", seed)
    announce(run, student, 0)
    writer, warm = rollout_worker(run, student), teacher_worker(run, teacher, "warm")
    step_until(writer, lambda: wrote(run, "r1", 1)() and wrote(run, "r2", 1)())
    for _ in range(3):
        warm.step(block_s=0.001)
    first, second = (int(run.field(rid, "scored") or 0) for rid in ("r1", "r2"))
    assert first >= 1 and second >= 1
    step_until(writer, lambda: wrote(run, "r1", first + 2)() and wrote(run, "r2", second + 2)())
    run.client.hset(run.key("rollout:r1"), "t:0", breaking(run.field("r1", "t:0") or b""))
    cold = teacher_worker(run, teacher, "cold")
    for _ in range(8):
        cold.step(block_s=0.001)
    assert [(entry["rid"], entry["stage"]) for entry in run.entries("dead")] == [("r1", "teacher")]
    assert run.field("r1", "verdict") == b"dead"
    assert run.field("r1", "attempts") == str(run.config.liveness.max_attempts).encode()
    assert run.field("r1", "scored") == str(first).encode()
    assert run.field("r2", "scored") == run.field("r2", "chunks")
    assert run.pending(f"chunks:{run.plane.shard_of('r1')}") == 0


def changed(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: replace(ChunkTokens.decode(data), **changes).encode()


def shortened(data: bytes) -> bytes:
    return changed(tokens=ChunkTokens.decode(data).tokens[:-1])(data)


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (None, "chunk 0 is missing"),
        (shortened, "7 tokens are stored before token 8"),
        (changed(seq=1), "chunk 1 from token 0 is stored as chunk 0"),
        (changed(start=2), "chunk 0 from token 2 is stored as chunk 0"),
    ],
    ids=["missing", "short", "another", "elsewhere"],
)
def test_the_prefix_of_a_chunk_is_read_from_the_record_or_the_chunk_is_given_up(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel, breaking: Callable[[bytes], bytes] | None, reason: str
) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer, warm = rollout_worker(run, student), teacher_worker(run, teacher, "warm")
    step_until(writer, wrote(run, "r1", 1))
    while run.field("r1", "scored") != b"1":
        warm.step(block_s=0.001)
    step_until(writer, wrote(run, "r1", 2))
    name = run.key("rollout:r1")
    if breaking:
        run.client.hset(name, "t:0", breaking(run.field("r1", "t:0") or b""))
    else:
        run.client.hdel(name, "t:0")
    cold = teacher_worker(run, teacher, "cold")
    for attempt in range(1, run.config.liveness.max_attempts + 1):
        assert run.field("r1", "verdict") is None
        cold.step(block_s=0.01)
        assert run.field("r1", "attempts") == str(attempt).encode()
    assert (run.field("r1", "verdict"), run.field("r1", "scored")) == (b"dead", b"1")
    assert [entry["reason"] for entry in run.entries("dead")] == [f"an earlier chunk: {reason}"]


@pytest.mark.parametrize("how", ["judged", "gone"])
def test_a_rollout_that_ends_while_it_is_read_is_not_broken(
    run: Run, student: PreTrainedModel, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer, warm = rollout_worker(run, student), teacher_worker(run, teacher)
    step_until(writer, wrote(run, "r1", 1))
    while run.field("r1", "scored") != b"1":
        warm.step(block_s=0.001)
    step_until(writer, wrote(run, "r1", 2))
    scorer = scorer_of(run, teacher)
    cold = teacher_worker(run, teacher, "cold", scorer)
    score, fields, prefixes = scorer.score, run.plane.fields, []

    def scored(requests: Sequence[ScoreRequest]) -> list[Scored]:
        prefixes.extend(len(one.prefix) for one in requests if one.prefix is not None)
        return score(requests)

    def ending(wanted: Iterable[tuple[str, list[str]]]) -> list[list[bytes | None]]:
        """The rollout ends before the prefix of its chunk is read."""
        asked = list(wanted)
        if any("t:0" in names and "t:1" not in names for _, names in asked):
            if how == "gone":
                run.client.delete(run.key("rollout:r1"))
            else:
                run.client.hdel(run.key("rollout:r1"), "t:0")
                run.client.hset(run.key("rollout:r1"), "verdict", "any")
        return fields(asked)

    monkeypatch.setattr(scorer, "score", scored)
    monkeypatch.setattr(run.plane, "fields", ending)
    assert cold.step(block_s=0.01)
    assert prefixes == [CHUNK]
    assert run.field("r1", "scored") == (None if how == "gone" else b"1")
    assert run.field("r1", "d:1") is None
    assert run.entries("dead") == []
    assert scorer.cached("r1") == -1


@pytest.mark.parametrize("field", ["t:0", "chunks", "length", "scored"])
def test_a_takeover_of_a_broken_record_counts_attempts_and_the_rest_is_written(
    run: Run, student: PreTrainedModel, field: str
) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    first = rollout_worker(run, student, "first")
    step_until(first, wrote(run, "r1", 1))
    first.close()
    broken = beyond_the_vocabulary(run.field("r1", "t:0") or b"") if field == "t:0" else b"1x"
    run.client.hset(run.key("rollout:r1"), field, broken)
    admit(run, "r2", 3)
    second = rollout_worker(run, student, "second")
    step_until(second, lambda: wrote(run, "r2", 1)() and run.field("r1", "verdict") is not None)
    assert run.field("r1", "verdict") == b"dead"
    assert run.field("r1", "attempts") == str(run.config.liveness.max_attempts).encode()
    assert [(entry["rid"], entry["stage"]) for entry in run.entries("dead")] == [("r1", "rollout")]


def test_a_count_of_claims_that_is_not_a_number_counts_an_attempt(run: Run, student: PreTrainedModel) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    run.take("silent", "n0")
    run.client.hset(run.key("rollout:r1"), "claims", "many")
    reasons = []
    run.plane.fail = lambda *args, fail=run.plane.fail, **facts: reasons.append(args[2]) or fail(*args, **facts)
    time.sleep(run.config.liveness.claim_s)
    step_until(rollout_worker(run, student), wrote(run, "r1", 1))
    assert reasons == ["rollout.claims: not a number"]
    assert run.field("r1", "claims") is None


@pytest.mark.parametrize("value", [None, "many"])
def test_a_count_of_chunks_broken_under_its_writer_is_given_up_and_the_rest_is_written(
    run: Run, student: PreTrainedModel, value: str | None
) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    admit(run, "r2", seed)
    announce(run, student, 0)
    writer = rollout_worker(run, student)
    step_until(writer, lambda: wrote(run, "r1", 1)() and wrote(run, "r2", 1)())
    name = run.key("rollout:r1")
    run.client.hset(name, "chunks", value) if value else run.client.hdel(name, "chunks")
    step_until(writer, lambda: wrote(run, "r2", 2)() and run.field("r1", "verdict") is not None)
    assert run.field("r1", "attempts") == str(run.config.liveness.max_attempts).encode()
    assert [(entry["rid"], entry["stage"]) for entry in run.entries("dead")] == [("r1", "rollout")]


@pytest.mark.parametrize(
    "pointer",
    [{"version": "new"}, {"version": "-3"}, {"version": "9" * 400}, {"version": "7", "step": ""}],
)
def test_a_pointer_that_no_learner_wrote_is_refused_and_writing_continues(
    run: Run, student: PreTrainedModel, pointer: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    admit(run, "r1", long_seed(run, student))
    announce(run, student, 0)
    writer = rollout_worker(run, student)
    step_until(writer, wrote(run, "r1", 1))
    run.client.hset(run.key("policy"), mapping=pointer)
    CLOCK.all_is_due()
    step_until(writer, lambda: "weights refused" in caplog.text)
    assert "policy pointer: " in caplog.text
    assert writer.version == 0
    assert writer.step()
    run.client.delete(run.key("policy"))
    announce(run, student, 1)
    CLOCK.all_is_due()
    step_until(writer, lambda: writer.version == 1)


def test_a_count_of_scores_broken_under_its_writer_harms_no_other_rollout(run: Run, student: PreTrainedModel) -> None:
    seed = long_seed(run, student)
    admit(run, "r1", seed)
    admit(run, "r2", seed)
    announce(run, student, 0)
    writer = rollout_worker(run, student)
    step_until(writer, lambda: wrote(run, "r1", 1)() and wrote(run, "r2", 1)())
    run.client.hset(run.key("rollout:r1"), "scored", "many")
    step_until(writer, lambda: wrote(run, "r2", 2)() and run.field("r1", "verdict") is not None)
    assert [(entry["rid"], entry["stage"]) for entry in run.entries("dead")] == [("r1", "rollout")]


def test_a_notice_without_a_chunk_is_acknowledged_and_does_no_harm(run: Run, teacher: PreTrainedModel) -> None:
    run.admit("r1")
    shard = run.plane.shard_of("r1")
    run.client.xadd(run.key(f"chunks:{shard}"), {"rid": "r1", "seq": 7})
    run.client.xadd(run.key(f"chunks:{shard}"), {"rid": "nobody", "seq": 0})
    run.client.xadd(run.key(f"chunks:{shard}"), {"what": "?"})
    scorer = teacher_worker(run, teacher)
    for _ in range(3):
        scorer.step(block_s=0.001)
    assert run.client.xlen(run.key(f"chunks:{shard}")) == 0
    assert run.field("r1", "verdict") is None
    assert [entry["stage"] for entry in run.entries("dead")] == ["chunks"]


def test_a_prompt_that_does_not_fit_is_given_up_and_the_rest_is_written(run: Run, student: PreTrainedModel) -> None:
    run.admit("r1", prompt=np.zeros(100, np.int32), max_new_tokens=LENGTH)
    admit(run, "r2", 3)
    announce(run, student, 0)
    writer = rollout_worker(run, student)
    step_until(writer, lambda: wrote(run, "r2", 1)() and run.field("r1", "verdict") is not None)
    assert [(entry["rid"], entry["stage"]) for entry in run.entries("dead")] == [("r1", "rollout")]


def test_the_end_of_the_run_ends_the_worker_task(run: Run, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    admit(run, "r1", 1)
    announce(run, student, 0)
    run.client.set(run.key("run"), "ended")
    began = time.monotonic()
    rollout_worker(run, student).serve(time.monotonic() + 20)
    teacher_worker(run, teacher).serve(time.monotonic() + 20)
    assert time.monotonic() - began < 5
    assert run.plane.live(60) == {}


def test_a_worker_has_a_number_of_its_own_until_its_task_ends(run: Run, student: PreTrainedModel) -> None:
    announce(run, student, 0)
    first, second = (rollout_worker(run, student, name) for name in ("w1", "w2"))
    assert [one._shared().number() for one in (first, second)] == [0, 1]
    first.serve(until=0.0)
    third = rollout_worker(run, student, "w3")
    assert third._shared().number() == 0
    for one in (second, third):
        one.serve(until=0.0)


def test_shards_move_only_from_or_to_the_teacher_that_joins_or_leaves() -> None:
    before = {shard: rendezvous(shard, ["a", "b", "c"]) for shard in range(256)}
    after = {shard: rendezvous(shard, ["a", "b", "c", "d"]) for shard in range(256)}
    moved = {shard for shard in before if before[shard] != after[shard]}
    assert {after[shard] for shard in moved} == {"d"}
    assert 32 < len(moved) < 96


def test_the_teachers_own_outcomes_reach_the_learner_and_change_no_divergence(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """From the scorer over the record to the trajectory, beside a run without them that writes the same text."""
    found = {}
    for own in (0, 5):
        run = start(
            embedded_redis,
            rollout={"chunk_tokens": CHUNK, "max_completion_length": LENGTH, "slots": 4, "teacher_support": own},
            data={"max_prompt_length": 16},
            termination={"teacher_top_k": 4},
        )
        admit(run, "r1", seed=long_seed(run, student))
        announce(run, student, 0)
        writer, scorer = rollout_worker(run, student), teacher_worker(run, teacher)
        step_until(writer, wrote(run, "r1", 2))
        while int(run.field("r1", "scored") or 0) < 2:
            scorer.step(block_s=0.01)
        record = run.plane.rollout("r1")
        tokens, divergence = np.array(tokens_of(run, "r1"), np.int32), np.zeros(2 * CHUNK, np.float32)
        kept = 2 * CHUNK - 3
        counts = {"trigger": kept, "keep": kept, "train": kept}
        verdict = make_verdict(tokens=tokens, divergence=divergence, **counts)
        found[own] = record, read_trajectory({**record, b"verdict": verdict.encode()}, VOCAB)
    (plain, without), (wider, trajectory) = found[0], found[5]
    for seq in range(2):
        assert plain[b"d:%d" % seq] == wider[b"d:%d" % seq], "what a policy sees"
        assert plain[b"p:%d" % seq] == wider[b"p:%d" % seq]
    assert without.support_ids.shape == (13, 4) and trajectory.support_ids.shape == (13, 9)
    np.testing.assert_array_equal(trajectory.support_ids[:, :4], without.support_ids)
    np.testing.assert_array_equal(trajectory.teacher_logprobs[:, :5], without.teacher_logprobs)
    np.testing.assert_array_equal(trajectory.teacher_sampled, without.teacher_sampled)

    network: Any = teacher
    with torch.no_grad():
        text = torch.from_numpy(np.concatenate([PROMPT, trajectory.tokens]).astype(np.int64))[None]
        log_q = network(text).logits[0].double().log_softmax(-1).numpy()[len(PROMPT) - 1 :]
    for row, listed in enumerate(trajectory.support_ids):
        outside = [v for v in range(VOCAB) if v not in STOPS and v not in listed[:4]]
        likeliest = sorted(outside, key=lambda v: -log_q[row, v])
        assert listed[4:].tolist() == likeliest[:5]
        np.testing.assert_allclose(trajectory.teacher_logprobs[row, 5:], log_q[row, likeliest[:5]], atol=1e-4)
        assert trajectory.teacher_tail is not None and without.teacher_tail is not None
        rest = np.log(np.exp(log_q[row, likeliest[5:]]).sum())
        assert trajectory.teacher_tail[row] == pytest.approx(rest, abs=1e-4)


def test_chunks_with_and_without_the_teachers_own_outcomes_are_no_trajectory(run: Run) -> None:
    run.admit("r1")
    run.take()
    assert write_whole(run, "r1") == b"ok"
    record = run.plane.rollout("r1")
    n = len(ChunkTokens.decode(record[b"t:0"]).tokens)
    own = replace(
        ScoreSupport.decode(record[b"q:0"]),
        own_ids=np.ones((n, 1), np.int32),
        own_logprobs=np.zeros((n, 1), np.float32),
    )
    tokens = np.arange(LENGTH, dtype=np.int32)
    counts = {"trigger": LENGTH, "keep": LENGTH, "train": LENGTH}
    verdict = make_verdict(tokens=tokens, divergence=np.zeros(LENGTH, np.float32), **counts)
    broken = {**record, b"verdict": verdict.encode(), b"q:0": own.encode()}
    with pytest.raises(MessageError, match="some chunks have outcomes of the teacher's own and some have none"):
        read_trajectory(broken, 1 << 20)
