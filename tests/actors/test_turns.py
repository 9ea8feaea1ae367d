"""A rollout worker's round trips on a real Redis: what each must carry, also when something goes wrong.

A decoder without a model writes, and the worker's clock passes only where the worker works or waits: what is due when
does not depend on the machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from samples import Run, fenced

from actors.engine.adapters import unpacked
from actors.engine.decode import NO_TOKENS, ClosedChunk
from actors.rollout import RolloutWorker
from common.metrics import REGISTRY
from common.wire.messages import Ints
from common.wire.weights import publish
from ops.reach.embedded import EmbeddedRedis

SLOTS, LENGTH, STEP_S, TRIP_S = 4, 64, 0.02, 0.001
ROLLOUTS = [f"r{number}" for number in range(12)]


class Clock(threading.Event):
    """A fake of `time` and of the worker's stop event: waiting advances the time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        return self.is_set()


class Counting:
    """A decoder whose tokens are their positions. A step takes STEP_S and writes one token in every slot."""

    def __init__(self, clock: Clock, chunk: dict[str, int], length: int) -> None:
        self._clock, self._chunk, self._length = clock, chunk, length
        self._known: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._held: set[str] = set()
        self.decoded_tokens = 0
        self.swapped: list[Any] = []

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(self._known)

    @property
    def free(self) -> int:
        return self.slots - len(self._known)

    def known(self, key: str) -> int:
        return self._known[key]

    slots = SLOTS

    def add(
        self, key: str, prompt: Ints, *, seed: int, max_new_tokens: int, generated: Ints = NO_TOKENS, unwatched: int = 0
    ) -> None:
        assert len(self._known) < SLOTS, "no free slot"
        self._known[key] = self._start[key] = len(generated)

    def remove(self, key: str) -> int:
        self._held.discard(key)
        return self._known.pop(key)

    def hold(self, key: str) -> None:
        assert key in self._known
        self._held.add(key)

    def release(self, key: str) -> None:
        assert key in self._known
        self._held.discard(key)

    def read_weights(self, data: bytes) -> Any:
        return unpacked(data)

    def attach(self, shared: Any) -> bool:
        return True

    def swap(self, state: Any, version: int = 0) -> None:
        self.swapped.append(state)

    def prove(self) -> None:
        pass

    def close_chunks(self) -> list[ClosedChunk]:
        return [self._closed(key) for key in self.busy if self._known[key] > self._start[key]]

    def step(self, only: Sequence[str] | None = None) -> list[ClosedChunk]:
        self._clock.now += STEP_S
        closed = []
        for key in self.busy:
            if key in self._held or (only is not None and key not in only):
                continue
            self._known[key] += 1
            self.decoded_tokens += 1
            written = self._known[key] - self._start[key]
            if self._known[key] == self._length or written == self._chunk.get(key, self._chunk[""]):
                closed.append(self._closed(key))
        return closed

    def _closed(self, key: str) -> ClosedChunk:
        start, end = self._start[key], self._known[key]
        self._start[key] = end
        n = end - start
        done = end == self._length
        if done:
            self.remove(key)
        return ClosedChunk(
            key=key,
            start=start,
            tokens=np.arange(start, end, dtype=np.int32),
            support_ids=np.zeros((n, 2), np.int32),
            support_logprobs=np.full((n, 3), np.log(1 / 8), np.float32),
            tail_logprobs=np.full(n, np.log(5 / 8), np.float32),
            rollout_logprobs=np.full(n, np.log(1 / 8), np.float32),
            sampled_logprobs=np.full(n, np.log(1 / 4), np.float32),
            finish="eos" if done else None,
        )


class Turns:
    """A worker of SLOTS slots and the calls of each of its round trips. A trip takes TRIP_S, whatever is in it."""

    def __init__(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, *, chunk: dict[str, int], length: int = LENGTH
    ) -> None:
        self.run, self.clock, self.trip_s = run, Clock(), TRIP_S
        self.decoder = Counting(self.clock, chunk, length)
        self.trips: list[Sequence[Any]] = []
        call_all = run.plane.call_all

        def timed(calls: Sequence[Any]) -> list[Any]:
            self.trips.append(calls)
            self.clock.now += self.trip_s
            return call_all(calls)

        monkeypatch.setattr(run.plane, "call_all", timed)
        decoder: Any = self.decoder
        self.worker = RolloutWorker(
            run.config, run.plane, decoder, worker="w1", stop=self.clock, clock=self.clock.monotonic
        )
        announce(run, 0)
        assert self.worker.open()
        self.decoder.swapped.clear()
        for rid in ROLLOUTS:
            assert run.admit(rid, max_new_tokens=LENGTH) == b"ok"

    def go(self, turns: int) -> None:
        for _ in range(turns):
            assert self.worker.step()

    def until(self, what: Callable[[], bool], turns: int, *, pause_s: float = 0.0) -> None:
        """Run until `what()` holds, at most `turns` steps. `pause_s`: real time between them, for another thread."""
        for _ in range(turns):
            if what():
                return
            assert self.worker.step()
            time.sleep(pause_s)
        assert what(), f"it did not happen within {turns} steps"

    def beats(self, rid: str) -> int:
        """Number of heartbeats for this rollout."""
        return sum(call.script == "beat" and rid in call.args for calls in self.trips for call in calls)

    def owned(self) -> set[str]:
        """Rollouts that have an owner in Redis, and neither an end nor a verdict."""
        over = ("verdict", "finish")
        return {
            rid
            for rid in ROLLOUTS
            if self.run.field(rid, "owner") and not any(self.run.field(rid, name) for name in over)
        }

    def counts(self) -> dict[str, int]:
        entries = [one for one in self.run.entries("finished") if one["kind"] == "count"]
        return {one["rid"]: int(one["generated"]) for one in entries}


def announce(run: Run, version: int) -> Path:
    """Publish weights as the learner would; the file."""
    folder = run.config.run_dir / "weights"
    ref = publish(folder, version, lambda path: save_file({"weight": torch.zeros(2)}, path))
    run.lease("learner").call(fenced("publish", version, version, ref.file, ref.sha256))
    return folder / ref.file


Begin = Callable[..., Turns]


@pytest.fixture
def begin(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Begin:
    def on(server: EmbeddedRedis, *, chunk: dict[str, int], length: int = LENGTH) -> Turns:
        rollout = {"slots": SLOTS, "chunk_tokens": 16, "max_unscored_chunks": 1000, "max_completion_length": LENGTH}
        return Turns(start(server, rollout=rollout), monkeypatch, chunk=chunk, length=length)

    return on


# --- a chunk closes at every step: each is sent at once, and nothing else is sent between two steps ---

AT_EVERY_STEP = {"": 1, "r0": 1000}


def test_rollouts_are_kept_alive_although_chunks_close_at_every_step(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk=AT_EVERY_STEP)
    turns.go(40)
    assert turns.decoder.busy == ("r0", "r1", "r2", "r3")
    passed = 40 * STEP_S
    assert turns.beats("r1") >= passed / (2 * turns.run.config.liveness.heartbeat_s)
    assert turns.beats("r1") == turns.beats("r0")


def test_a_stop_frees_a_slot_that_is_filled_although_chunks_close_at_every_step(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk=AT_EVERY_STEP)
    turns.go(10)
    written = turns.decoder.known("r0")
    assert turns.run.verdict("r0", stop=True, entries=[]) == b"ok"
    turns.until(lambda: "r0" not in turns.decoder.busy, turns=4)
    turns.until(lambda: turns.decoder.busy == ("r1", "r2", "r3", "r4"), turns=4)
    turns.until(lambda: "r0" in turns.counts(), turns=4)
    assert written <= turns.counts()["r0"] <= written + 4


def test_new_weights_are_swapped_in_although_chunks_close_at_every_step(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk=AT_EVERY_STEP)
    turns.go(10)
    announce(turns.run, 1)
    turns.until(lambda: len(turns.decoder.swapped) == 1, turns=60, pause_s=0.05)  # read by a thread
    assert turns.worker.version == 1


def test_on_a_slow_connection_a_worker_is_silent_for_at_most_half_a_heartbeat(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk=AT_EVERY_STEP)
    turns.go(2)
    turns.trip_s = 3.0  # as while Redis was away
    turns.until(lambda: turns.clock.now > 1003.0, turns=8)
    turns.trip_s = TRIP_S
    beats, trips = turns.beats("r1"), len(turns.trips)
    longest = turns.run.config.liveness.heartbeat_s / 2
    turns.go(int(longest / STEP_S) + 2)
    assert len(turns.trips) > trips
    assert turns.beats("r1") > beats


# --- what is wrong on the way ---


def test_a_script_that_redis_has_lost_makes_no_other_script_run_twice(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk={"": 16})
    turns.until(lambda: len(turns.decoder.busy) == SLOTS, turns=4)
    assert turns.run.verdict("r0", stop=True, entries=[]) == b"ok"
    # As after a start of Redis: each script is unknown until somebody needs it. Nobody was stopped since.
    turns.run.client.script_flush()
    for name, script in turns.run.plane._scripts.items():
        if name != "count":
            turns.run.client.script_load(script.script)
    turns.until(lambda: "r0" in turns.counts(), turns=6)
    trips = [[call.script for call in calls] for calls in turns.trips]
    together = [name for names in trips if "count" in names for name in names]
    assert "take" in together, "the slot was filled by the trip that found no script"
    assert turns.owned() == set(turns.worker.writing) == set(turns.decoder.busy) == {"r1", "r2", "r3", "r4"}


def test_a_closing_worker_reports_the_length_of_rollouts_judged_before(
    embedded_redis: EmbeddedRedis, begin: Begin
) -> None:
    turns = begin(embedded_redis, chunk={"": 16})
    turns.until(lambda: "r1" in turns.decoder.busy and turns.decoder.known("r1") == 21, turns=30)
    assert turns.run.field("r1", "length") == b"16"
    assert turns.run.verdict("r1", stop=True, entries=[]) == b"ok"
    turns.worker.close()  # it does not know of the verdict: its open chunk is refused
    assert turns.counts() == {"r1": 21}
    assert [turns.run.field(rid, "length") for rid in ("r0", "r1", "r2", "r3")] == [b"21", b"16", b"21", b"21"]
    assert turns.owned() == set()


@pytest.mark.parametrize(
    "pointer", [{"version": b"\xff\xfe"}, {b"\xff\xfe": b"1"}, {"version": b"\xff", "step": b"\xfe"}]
)
def test_a_pointer_of_junk_bytes_ends_no_step(
    embedded_redis: EmbeddedRedis, begin: Begin, pointer: dict[str | bytes, bytes]
) -> None:
    turns = begin(embedded_redis, chunk={"": 16})
    turns.run.client.hset(turns.run.key("policy"), mapping=pointer)
    turns.go(20)
    assert turns.run.field("r0", "chunks") == b"1"
    assert (turns.decoder.swapped, turns.worker.version) == ([], 0)


@pytest.fixture
def full(own_redis: EmbeddedRedis, begin: Begin) -> Iterator[Turns]:
    """Redis refuses chunks, and rollouts end with their first one."""
    turns = begin(own_redis, chunk={"": 16}, length=8)
    turns.run.client.config_set("maxmemory", int(turns.run.client.info("memory")["used_memory"] / 0.9))
    yield turns
    turns.run.client.config_set("maxmemory", 0)


def test_a_worker_whose_chunks_a_full_redis_refused_takes_no_more(
    full: Turns, caplog: pytest.LogCaptureFixture
) -> None:
    """The trip that is refused for the first time may have filled the slots again; no later one does."""

    def refusals() -> float:
        return REGISTRY.get_sample_value("katana_chunks_refused_total") or 0.0

    before = refusals()
    full.until(lambda: refusals() > before, turns=20)
    taken, refused = full.owned(), refusals()
    assert SLOTS <= len(taken) <= 2 * SLOTS
    full.go(60)  # past several tries to send what was refused
    assert refusals() > refused
    assert len([text for text in caplog.messages if "Redis is full" in text]) == 1, "logged once, not at every attempt"
    assert full.owned() == set(full.worker.writing) == taken
    assert [full.run.field(rid, "chunks") for rid in ROLLOUTS] == [b"0"] * len(ROLLOUTS)
    full.run.client.config_set("maxmemory", 0)
    full.until(lambda: all(full.run.field(rid, "finish") == b"eos" for rid in ROLLOUTS), turns=200)
    assert full.worker.writing == ()
