"""Workers with slow work keep their rollouts and chunks; workers that hang lose them. Real threads, a real Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from samples import Run
from test_turns import Counting, announce

import actors.weights
from actors.engine import Scored, ScoreRequest
from actors.engine.adapters import unpacked
from actors.rollout import RolloutWorker
from actors.teacher import TeacherWorker, rendezvous
from common.metrics import REGISTRY
from common.wire.plane import Roster
from ops.reach.embedded import EmbeddedRedis

CLAIM_S = 0.4
LONG_S = 5 * CLAIM_S


class Slow(Counting):
    """A decoder whose steps can be made slow."""

    def __init__(self) -> None:
        super().__init__(clock=_NoClock(), chunk={"": 8}, length=10_000)
        self.sleeps_s = 0.0

    def step(self, only: Any = None) -> Any:
        sleeps_s, self.sleeps_s = self.sleeps_s, 0.0
        time.sleep(sleeps_s or 0.005)
        return super().step(only)


class _NoClock:
    now = 0.0


class SlowScorer:
    """A scorer without a model; its first batch is slow."""

    held, slots, rebuilt_tokens = 0, 32, 0

    def __init__(self, sleeps_s: float) -> None:
        self.sleeps_s, self.asked = sleeps_s, 0

    def cached(self, key: str) -> int:
        return 0

    def drop(self, key: str) -> None:
        pass

    def prove(self) -> None:
        pass

    def score(self, requests: list[ScoreRequest]) -> list[Scored]:
        self.asked += len(requests)
        time.sleep(self.sleeps_s)
        self.sleeps_s = 0.0
        return [
            Scored(
                key=one.key,
                start=one.start,
                teacher_logprobs=np.full((len(one.tokens), 3), np.log(1 / 8), np.float32),
                tail_logprobs=np.full(len(one.tokens), np.log(5 / 8), np.float32),
                sampled=np.full(len(one.tokens), np.log(1 / 8), np.float32),
            )
            for one in requests
        ]

    score_in_turn = score


@pytest.fixture
def run(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Run:
    run = start(
        embedded_redis,
        rollout={"slots": 4, "chunk_tokens": 8, "max_unscored_chunks": 1000, "max_completion_length": 64},
        termination={"teacher_top_k": 2},
        liveness={"heartbeat_s": CLAIM_S / 4, "claim_s": CLAIM_S, "busy_s": 60.0},
    )
    announce(run, 0)
    return run


# What tells a worker to stop.
STOPS: WeakKeyDictionary[RolloutWorker | TeacherWorker, threading.Event] = WeakKeyDictionary()


def writer(run: Run, name: str, decoder: Counting) -> RolloutWorker:
    unchecked: Any = decoder
    stop = threading.Event()
    worker = RolloutWorker(run.config, run.plane, unchecked, worker=name, stop=stop)
    STOPS[worker] = stop
    return worker


@contextmanager
def serving(worker: RolloutWorker | TeacherWorker) -> Iterator[None]:
    """Run the worker in its own thread, and stop it at the end."""
    thread = threading.Thread(target=worker.serve, args=(time.monotonic() + 60,))
    thread.start()
    try:
        yield
    finally:
        STOPS[worker].set()
        thread.join(20)
        assert not thread.is_alive()


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def worker_of(run: Run, rid: str = "r1") -> bytes | None:
    return run.field(rid, "worker")


@contextmanager
def rollout_written_by_one_of_two(run: Run) -> Iterator[tuple[RolloutWorker, Slow]]:
    """`first` writes a rollout, and `second` is idle and could take over."""
    decoder = Slow()
    first, second = writer(run, "first", decoder), writer(run, "second", Slow())
    run.admit("r1")
    with serving(first):
        until(lambda: worker_of(run) == b"first")
        with serving(second):
            yield first, decoder


def test_a_worker_that_reads_weights_for_long_continues_writing_and_keeps_its_rollouts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = actors.weights.verified

    reading = threading.Event()

    def slowly(*args: Any) -> bytes:
        reading.set()
        time.sleep(LONG_S)
        return verified(*args)

    with rollout_written_by_one_of_two(run) as (first, decoder):
        monkeypatch.setattr(actors.weights, "verified", slowly)
        announce(run, 1)
        until(reading.is_set)
        chunks = int(run.field("r1", "chunks") or 0)
        until(lambda: int(run.field("r1", "chunks") or 0) > chunks + 2)  # written beside the reading
        assert decoder.swapped[1:] == []
        until(lambda: len(decoder.swapped) == 2)
        assert first.version == 1
        assert (worker_of(run), run.field("r1", "claims")) == (b"first", None)


@pytest.mark.parametrize("at", ["a step", "a swap"])
def test_a_worker_at_one_long_piece_of_work_keeps_its_rollouts(
    run: Run, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with rollout_written_by_one_of_two(run) as (_, decoder):
        if at == "a step":
            decoder.sleeps_s = LONG_S
        else:
            swap = decoder.swap
            monkeypatch.setattr(decoder, "swap", lambda *given: (time.sleep(LONG_S), swap(*given)))
            announce(run, 1)
        time.sleep(LONG_S + CLAIM_S)
        assert (worker_of(run), run.field("r1", "claims")) == (b"first", None)
        chunks = int(run.field("r1", "chunks") or 0)
        until(lambda: int(run.field("r1", "chunks") or 0) > chunks)
        assert worker_of(run) == b"first"


def test_a_worker_whose_writer_is_long_in_coming_is_seen_all_the_while(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vLLM server on a busy machine takes tens of seconds to say what it is."""
    decoder, ready = Slow(), threading.Event()
    monkeypatch.setattr(decoder, "attach", lambda _: ready.wait(20))

    def seen_at() -> float:
        return float(run.client.zscore(run.key("workers"), "first") or 0.0)

    with serving(writer(run, "first", decoder)):
        until(lambda: seen_at() > 0)
        time.sleep(LONG_S)
        before = seen_at()
        until(lambda: seen_at() > before, seconds=5.0)
        ready.set()


def test_a_worker_whose_loop_hangs_loses_its_rollouts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    call_all = run.plane.call_all

    def hanging(calls: Any) -> Any:
        if any(call.script == "beat" and "first" in call.args for call in calls):
            hangs.wait(20)
        return call_all(calls)

    with rollout_written_by_one_of_two(run):
        monkeypatch.setattr(run.plane, "call_all", hanging)
        until(lambda: worker_of(run) == b"second")
        hangs.set()


def test_a_worker_whose_work_never_ends_loses_its_rollouts(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(
        embedded_redis,
        rollout={"slots": 4, "chunk_tokens": 8, "max_unscored_chunks": 1000, "max_completion_length": 64},
        liveness={"heartbeat_s": CLAIM_S / 4, "claim_s": CLAIM_S, "busy_s": 1.0},
    )
    announce(run, 0)
    with rollout_written_by_one_of_two(run) as (_, decoder):
        decoder.sleeps_s = 8.0
        until(lambda: worker_of(run) == b"second", seconds=7.0)


def test_a_teacher_at_one_long_batch_keeps_its_chunks(run: Run) -> None:
    run.admit("r1")
    run.take("w", "n1")
    run.chunk("r1", "n1")
    slow, idle = SlowScorer(LONG_S), SlowScorer(0.0)
    with serving(teacher(run, "t1", slow)):
        until(lambda: slow.asked == 1)
        with serving(teacher(run, "t2", idle)):
            until(lambda: run.field("r1", "scored") == b"1")
    assert (slow.asked, idle.asked, run.field("r1", "taken")) == (1, 0, None)


def teacher(run: Run, name: str, scorer: SlowScorer) -> TeacherWorker:
    unchecked: Any = scorer
    stop = threading.Event()
    worker = TeacherWorker(run.config, run.plane, unchecked, vocab_size=37, stop_count=1, worker=name, stop=stop)
    STOPS[worker] = stop
    return worker


def test_an_idle_teacher_without_a_shard_waits_until_it_gets_one(run: Run) -> None:
    shards = range(run.plane.shards)
    names = (f"t{number}" for number in range(10_000))
    name = next(name for name in names if {rendezvous(shard, [name, "greedy"]) for shard in shards} == {"greedy"})
    one = teacher(run, name, SlowScorer(0.0))
    step, read = one.step, run.plane.read
    turns, waited_for = 0, []  # streams of each read that waits

    def counted() -> bool:
        nonlocal turns
        turns += 1
        return step()

    def seen(group: str, consumer: str, streams: Any, *, count: int, block_s: float) -> Any:
        waited_for.extend([len(streams)] * (block_s > 0))
        return read(group, consumer, streams, count=count, block_s=block_s)

    one.step = counted  # type: ignore[method-assign,assignment]
    run.plane.read = seen  # type: ignore[method-assign]
    run.plane.seen("greedy", role="teacher", roster=Roster(60.0))
    with serving(one):
        time.sleep(0.3)  # until its pulse has seen the other one
        turns = 0
        waited_for.clear()
        for _ in range(4):
            time.sleep(0.25)
            run.plane.seen("greedy", role="teacher", roster=Roster(60.0))
        assert waited_for == []
        assert turns <= 1.0 / 0.05 + 2, "it waits at least 50 ms between two polls"
        run.plane.gone("greedy", role="teacher")
        until(lambda: run.plane.shards in waited_for)


@pytest.mark.parametrize(("help_after_s", "takes_it"), [(60.0, False), (0.0, True)])
def test_chunks_of_others_are_taken_by_a_teacher_that_has_been_idle_for_a_while(
    run: Run, monkeypatch: pytest.MonkeyPatch, help_after_s: float, takes_it: bool
) -> None:
    monkeypatch.setattr("actors.teacher._HELP_AFTER_S", help_after_s)
    run.admit("r1")
    run.take("w", "n1")
    run.chunk("r1", "n1")
    one = teacher(run, "t1", SlowScorer(0.0))
    one._roster.names, one._roster.revision = ["another"], b"7"
    assert [one.step(block_s=0.01) for _ in range(3)] == [takes_it, False, False]
    assert run.field("r1", "scored") == (b"1" if takes_it else b"0")


def test_an_idle_worker_polls_less_and_less_and_finds_new_work(run: Run) -> None:
    one = writer(run, "w1", Slow())
    asked = 0
    call_all = run.plane.call_all

    def counted(calls: Any) -> Any:
        nonlocal asked
        asked += any(call.script == "take" for call in calls)
        return call_all(calls)

    run.plane.call_all = counted  # type: ignore[method-assign]
    with serving(one):
        time.sleep(1.5)
        before = asked
        assert before <= 100, "at 100 Hz it would have asked 150 times"
        run.admit("r1")
        until(lambda: worker_of(run) == b"w1")


# --- reading weights ---


def refusals() -> float:
    return REGISTRY.get_sample_value("katana_dead_letters_total", {"reason": "weights"}) or 0.0


def test_weights_that_made_room_for_newer_ones_are_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = actors.weights.WeightsReader(run.config.run_dir / "weights")
    first = announce(run, 1)
    gate = threading.Event()
    verified = actors.weights.verified
    monkeypatch.setattr(actors.weights, "verified", lambda *args: (gate.wait(20), verified(*args))[1])
    before = refusals()
    assert reader.newer(run.plane.policy(), 0) is None
    first.unlink()
    announce(run, 2)
    gate.set()
    found: list[Any] = []
    until(lambda: bool(found.append(reader.newer(run.plane.policy(), 0)) or found[-1]))
    assert (found[-1].version, refusals()) == (2, before)


def test_weights_that_were_read_are_swapped_in_although_newer_ones_were_announced(run: Run) -> None:
    gate = threading.Event()
    reader = actors.weights.WeightsReader(
        run.config.run_dir / "weights", read=lambda data: (gate.wait(20), unpacked(data))[1]
    )
    announce(run, 1)
    assert reader.newer(run.plane.policy(), 0) is None
    announce(run, 2)
    gate.set()
    found: list[Any] = []
    until(lambda: bool(found.append(reader.newer(run.plane.policy(), 0)) or found[-1]))
    assert found[-1].version == 1
    newest = reader.newer(run.plane.policy(), 1, wait=True)
    assert newest is not None and newest.version == 2
    assert reader.newer(run.plane.policy(), 2, wait=True) is None


def test_torn_weights_are_refused_once_and_not_at_every_step(run: Run) -> None:
    reader = actors.weights.WeightsReader(run.config.run_dir / "weights")
    announce(run, 1).write_bytes(b"torn")
    before = refusals()
    for _ in range(5):
        assert reader.newer(run.plane.policy(), 0, wait=True) is None
    assert refusals() == before + 1


def test_a_worker_reports_the_version_that_it_refused(run: Run) -> None:
    announce(run, 1).write_bytes(b"torn")
    one = writer(run, "w1", Slow())
    with serving(one):
        until(lambda: run.plane.policy().get("refused") == "1")
        announce(run, 2)
        until(lambda: one.version == 2)
