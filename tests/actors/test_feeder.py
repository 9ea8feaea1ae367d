"""The real feeder on a real Redis: what is admitted, what is booked, and that neither happens twice or never."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import redis
from samples import Run, fenced, make_verdict, script, write_whole

from actors.feeder import COUNT_WAIT_S, HOUSEKEEPING_S, ROOM_S, Feeder, head_of
from common.footprint import ALLOWED_SHARE, maxmemory_mb, most_bytes, rollout_bytes
from common.metrics import REGISTRY
from common.rids import rid_of
from common.runfiles.lines import read_lines
from common.runfiles.records import Ledger
from common.wire.lease import Lease, LeaseLost
from common.wire.messages import Ints, RolloutHead
from common.wire.plane import create_run
from common.wire.scripts import Admitted
from ops.reach.embedded import EmbeddedRedis


class Counting:
    """Prompt n is the token n + 1; completions of even problems are right."""

    def prompt(self, problem: int) -> Ints:
        return np.array([problem + 1], np.int32)

    def judge(self, problem: int, tokens: Ints) -> bool:
        return problem % 2 == 0


class Desk:
    """A run whose feeder can be asked to go on, or be killed; everybody else is played by the test."""

    def __init__(self, run: Run) -> None:
        self.run, self.source = run, Counting()
        self.ahead_s = 0.0  # of the feeder's clock
        self.feeder = self.begin()
        self.taken: dict[str, bytes] = {}

    def new(self) -> Feeder:
        return Feeder(self.run.config, self.run.plane, self.source, threading.Event(), clock=self.clock)

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s

    def begin(self) -> Feeder:
        feeder = self.new()
        feeder.open()
        return feeder

    def go_on(self) -> None:
        while self.feeder.step(block_s=0.001):
            pass

    def kill(self) -> None:
        """No word, no last deed: only the lease runs out."""
        self.feeder.books.close()
        self.run.client.delete(self.run.key("lease:feeder"))

    def restart(self) -> None:
        self.kill()
        self.feeder = self.begin()

    def waited(self, seconds: float) -> None:
        """As if so much time had passed."""
        self.ahead_s += seconds
        self.go_on()

    # --- the others ---

    def take(self) -> list[str]:
        return [one[0].decode() for one in self.run.take("w1", "n1", count=1000)]

    def write(self, rid: str, *, tokens: int = 3, finish: str | None = "eos") -> None:
        assert self.run.chunk(rid, tokens=range(1, tokens + 1), finish=finish)[0] == b"ok"

    def judge(self, rid: str, **changes: Any) -> None:
        values = {"generated": 3, "cut": False, "finish_reason": "eos", "trigger": 3, "keep": 3, "train": 3} | changes
        body = make_verdict(rid, **values)
        args = (rid, body.encode(), body.train, 0, "", 4, "inactive", "")
        assert self.run.lease("arbiter").call(fenced("verdict", *args))[0] == b"ok"

    def count(self, rid: str, generated: int) -> None:
        assert self.run.plane.call(script("count", rid, "n1", generated)) == [b"ok"]

    def settle(self, rid: str, ending: str = "trained", reason: str = "", staleness: int | str = 0) -> None:
        if rid not in self.taken:
            self.taken.update(self.run.trajectories())
        reply = self.run.lease("learner").call(fenced("settle", self.taken.pop(rid), rid, ending, reason, staleness))
        assert reply == [b"ok", 1]

    def die(self, rid: str) -> None:
        assert self.run.plane.fail(rid, "rollout", "poison", max_attempts=1)

    def finish_run(self) -> None:
        self.run.lease("learner").advance("state", "trained")

    # --- looking ---

    def lines(self) -> dict[str, dict[str, Any]]:
        found = list(read_lines(self.run.config.run_dir / "rollouts.jsonl"))
        assert len({line["rid"] for line in found}) == len(found), "a rollout is booked twice"
        return {line["rid"]: line for line in found}

    def head(self, rid: str) -> RolloutHead:
        return RolloutHead.decode(self.run.field(rid, "head") or b"")


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def new(**overrides: Any) -> Desk:
        defaults: dict[str, Any] = {"learner": {"batch_size": 4, "max_staleness": 1, "max_steps": 100}}
        desks.append(Desk(start(embedded_redis, **(defaults | overrides))))
        return desks[-1]

    yield new
    for desk in desks:
        desk.feeder.books.close()


@pytest.fixture
def desk(begin: Callable[..., Desk]) -> Desk:
    return begin(feeder={"concurrency": 6})


# --- admission ---


def test_admission_is_bounded_by_writers_and_by_staleness(desk: Desk) -> None:
    """min(concurrency - running, (max_staleness + step + 1) · batch - (trained + waiting + running)), by hand."""

    def admitted() -> int:
        desk.go_on()
        return desk.run.ledger()["admitted"]

    assert admitted() == 6  # min(6 - 0, (1 + 0 + 1) · 4 - 0)
    a, b, c, *_ = desk.take()
    for rid in (a, b, c):
        desk.judge(rid)
    assert admitted() == 8  # + min(6 - 3, 8 - 6)
    desk.settle(a, "dropped", "stale", 5)
    assert admitted() == 9  # what was dropped gives its place back: + min(6 - 5, 8 - 7)
    desk.settle(b)
    assert admitted() == 9  # trained keeps its place
    desk.run.lease("learner").advance("step", 1)
    assert admitted() == 9  # 12 - 8 places, but six are being written
    desk.judge(desk.take()[0])
    assert admitted() == 10  # one writer is free
    desk.die(sorted(desk.take())[0])
    assert admitted() == 11  # the dead give their place back, too


def test_what_is_trained_and_not_checkpointed_is_neither_waiting_nor_running(begin: Callable[..., Desk]) -> None:
    desk = begin(feeder={"concurrency": 100})
    learner = desk.run.lease("learner")

    def admitted() -> int:
        desk.go_on()
        return desk.run.ledger()["admitted"]

    assert admitted() == 8  # (1 + 1) · 4
    learner.advance("step", 2)
    assert admitted() == 16  # 8 - (8 open - 8 trained since the checkpoint)
    learner.advance("covered", 2)
    assert admitted() == 16  # too many counted as open until they are booked, never too few
    # A learner that falls back to an older checkpoint needs what it lost anew: nothing trained is counted for ever.
    rids = [*desk.take(), *desk.take()]
    assert len(rids) == 16
    for rid in rids[:8]:
        desk.judge(rid)
        desk.settle(rid)
    learner.advance("step", 0)
    learner.advance("covered", 0)
    assert admitted() == 16  # 8 open
    for rid in rids[8:]:
        desk.judge(rid)
        desk.settle(rid)
    assert admitted() == 24


def test_streams_are_measured(desk: Desk) -> None:
    desk.go_on()
    desk.take()
    time.sleep(1.1)
    desk.waited(HOUSEKEEPING_S)
    assert REGISTRY.get_sample_value("katana_stream_outstanding", {"stream": "prompts", "teacher": ""}) == 6
    oldest = REGISTRY.get_sample_value("katana_stream_oldest_pending_seconds", {"stream": "prompts", "teacher": ""})
    assert oldest is not None
    assert 0 < oldest < 60
    assert REGISTRY.get_sample_value("katana_stream_outstanding", {"stream": "chunks", "teacher": ""}) == 0


@pytest.mark.parametrize("how", ["dead", "empty"])
def test_the_dead_and_the_dropped_give_their_place_back(begin: Callable[..., Desk], how: str) -> None:
    desk = begin(feeder={"concurrency": 100})
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 8}
    rid = desk.take()[0]
    if how == "dead":
        desk.die(rid)
    else:
        desk.judge(rid, keep=0, train=0)
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 9, "dead" if how == "dead" else "dropped:empty": 1}


def test_no_more_is_admitted_than_the_run_can_train(begin: Callable[..., Desk]) -> None:
    desk = begin(learner={"batch_size": 4, "max_staleness": 3, "max_steps": 2}, feeder={"concurrency": 100})
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 8}


def test_concurrency_is_by_default_five_quarters_of_the_live_slots(begin: Callable[..., Desk]) -> None:
    desk = begin(rollout={"slots": 4}, learner={"batch_size": 100, "max_steps": 100})
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 5}
    desk.run.plane.seen("w1", role="rollout", slots=4)
    desk.run.plane.seen("w2", role="rollout", slots=12)
    desk.run.plane.seen("t1", role="teacher", slots=99)
    desk.waited(HOUSEKEEPING_S)
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 20}


@contextmanager
def a_full_redis(desk: Desk) -> Iterator[None]:
    """One that refuses admissions."""
    each = desk.run.plane.call_all

    def refusing(calls: Sequence[Any]) -> list[Any]:
        refused: list[Any] = [Admitted.FULL for call in calls if call.script == "admit"]
        return refused or each(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk.run.plane, "call_all", refusing)
        yield


def test_a_full_redis_stops_admission_until_it_has_room(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with a_full_redis(desk):
        for _ in range(3):
            desk.waited(ROOM_S)
        assert desk.run.ledger() == {}
        assert len([text for text in caplog.messages if "short of memory" in text]) == 1
    desk.waited(ROOM_S)
    assert desk.take() == [f"r{number:09d}" for number in range(6)]


# --- admission by bytes ---


class SmallDesk(Desk):
    """A desk on a Redis of its own, with memory for so many rollouts of full length, and its clients."""

    def leave_room_for(self, rollouts: float) -> None:
        room = rollouts * rollout_bytes(self.run.config) + 4096
        memory = self.run.client.info("memory")["used_memory"] + room
        self.run.client.config_set("maxmemory", int(memory / ALLOWED_SHARE))

    def look_again(self) -> int:
        self.waited(ROOM_S)
        return self.run.ledger().get("admitted", 0)


@pytest.fixture
def small(own_redis: EmbeddedRedis, start: Callable[..., Run]) -> Iterator[Callable[..., SmallDesk]]:
    desks: list[SmallDesk] = []

    def new(rollouts: float, **overrides: Any) -> SmallDesk:
        defaults: dict[str, Any] = {
            "learner": {"batch_size": 12, "max_staleness": 1},
            "feeder": {"concurrency": 100},
            "rollout": {"max_completion_length": 256, "chunk_tokens": 16},
            "data": {"max_prompt_length": 8},
        }
        desks.append(SmallDesk(start(own_redis, **(defaults | overrides))))
        for known in desks[-1].run.plane._scripts.values():  # part of what a server holds, and not of what is admitted
            desks[-1].run.client.script_load(known.script)
        desks[-1].leave_room_for(rollouts)
        return desks[-1]

    yield new
    for desk in desks:
        desk.feeder.books.close()


def test_all_admitted_rollouts_can_be_completed(small: Callable[..., SmallDesk]) -> None:
    """24 places by count, memory for nine: as many are admitted as can all be written to their end, and no chunk of
    theirs is refused; those that wait for the learner make no room, those that are booked do."""
    desk = small(9.5)
    assert 8 <= desk.look_again() <= 9
    rids = desk.take()
    for until in (64, 128, None):  # in turns, as workers do
        for rid in rids:
            assert write_whole(desk.run, rid, until=until) == b"ok", "a chunk of what was admitted was refused"
        # What is written in full is no longer reserved: a little more may come, and that too fits.
        desk.look_again()
    for rid in desk.take():
        assert write_whole(desk.run, rid) == b"ok"
    before = desk.look_again()
    assert before < 24
    for rid in rids:
        desk.judge(rid, generated=256)
        desk.settle(rid)
    assert desk.look_again() >= before + 6


def test_one_is_admitted_if_nothing_is_being_written(
    small: Callable[..., SmallDesk], caplog: pytest.LogCaptureFixture
) -> None:
    """If other data fills Redis, the run does not wait forever for room, and logs it once."""
    desk = small(0.9, rollout={"max_completion_length": 2048, "chunk_tokens": 16})
    assert desk.look_again() == desk.look_again() == 1
    desk.judge(desk.take()[0])
    assert desk.look_again() == 2
    told = [text for text in caplog.messages if "short of memory" in text]
    assert len(told) == 1
    assert f"a maxmemory of {maxmemory_mb(most_bytes(desk.run.config))} MB is enough" in told[0]


@pytest.mark.parametrize("limited", [True, False])
def test_with_room_for_all_nothing_is_logged(
    small: Callable[..., SmallDesk], caplog: pytest.LogCaptureFixture, limited: bool
) -> None:
    desk = small(24.5)
    if not limited:
        desk.run.client.config_set("maxmemory", 0)
    assert desk.look_again() == 24
    assert not [text for text in caplog.messages if "memory" in text]


def test_a_broken_record_counts_with_its_full_length(small: Callable[..., SmallDesk]) -> None:
    desk = small(4.5)
    assert desk.look_again() == 4
    desk.run.client.hset(desk.run.key(f"rollout:{desk.take()[0]}"), "length", b"\xffmany")
    assert desk.look_again() == 4


def test_in_a_deterministic_run_a_batch_is_admitted_completely_or_not_at_all(small: Callable[..., SmallDesk]) -> None:
    desk = small(11.5, deterministic=True)
    assert desk.look_again() == 0
    desk.leave_room_for(12.5)
    assert desk.look_again() == 12


def test_heads_are_a_function_of_seed_and_place(begin: Callable[..., Desk]) -> None:
    desk = begin(data={"num_generations": 2}, feeder={"concurrency": 8}, learner={"batch_size": 100})
    desk.go_on()
    heads = [desk.head(rid) for rid in desk.take()]
    assert [head.problem for head in heads] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [head.prompt.tolist() for head in heads[:3]] == [[1], [1], [2]]
    assert len({head.seed for head in heads}) == 8
    assert all(head.max_new_tokens == 64 for head in heads)
    desk.restart()
    again = [head_of(desk.run.config, desk.source, place) for place in range(8)]
    assert [head.encode() for head in again] == [head.encode() for head in heads]


def test_the_control_arm_has_its_share(begin: Callable[..., Desk]) -> None:
    desk = begin(termination={"control_fraction": 0.25})
    arms = Counter(head_of(desk.run.config, desk.source, place).arm for place in range(4000))
    assert abs(arms["control"] / 4000 - 0.25) < 0.03


def test_a_prompt_that_is_too_long_ends_the_feeder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(problem: int) -> Ints:
        raise ValueError("problem 0: the prompt has 99 tokens")

    monkeypatch.setattr(desk.source, "prompt", too_long)
    with pytest.raises(ValueError, match="99 tokens"):
        desk.feeder.step(block_s=0.001)


# --- admission, deterministic ---


@pytest.mark.parametrize("restarted", [False, True])
def test_a_batch_is_admitted_whole_once_the_one_before_is_judged_and_trained(
    begin: Callable[..., Desk], restarted: bool
) -> None:
    """Also by a feeder that starts at any of these moments; `concurrency` and `max_staleness` do not count."""
    desk = begin(
        deterministic=True,
        feeder={"concurrency": 3},
        learner={"batch_size": 4, "max_steps": 3, "max_staleness": 3},
    )
    learner = desk.run.lease("learner")

    def admitted() -> int:
        if restarted:
            desk.restart()
        desk.go_on()
        return desk.run.ledger()["admitted"]

    def thresholds(rids: list[str]) -> set[bytes | None]:
        return {desk.run.field(rid, "threshold") for rid in rids}

    assert admitted() == 4
    first = desk.take()
    assert thresholds(first) == {b"inactive"}
    desk.run.client.set(desk.run.key("threshold"), "0.25")
    for rid, generated in ((first[1], None), (first[2], 3)):
        desk.judge(rid, keep=0, train=0, generated=generated)
        assert admitted() == 4
    desk.die(first[3])
    learner.call(fenced("publish", 7, 0, "v00000007.safetensors", "aa"))  # again, by a learner that was started again
    assert admitted() == 4  # one is still being written
    desk.run.client.set(desk.run.key("threshold"), "0.5")
    desk.judge(first[0])
    desk.run.client.set(desk.run.key("threshold"), "0.75")
    assert admitted() == 7  # two were empty, one died: all three are given back at once
    more = desk.take()
    assert thresholds(more) == {b"0.75"}
    for rid in more:
        desk.judge(rid)
    assert admitted() == 7
    learner.call(fenced("publish", 8, 1, "v00000008.safetensors", "aa"))
    assert admitted() == 11
    desk.count(first[1], 3)  # what is booked, and when, moves nothing
    second = desk.take()
    assert {desk.head(rid).step for rid in first[:1] + more} == {0}
    assert {desk.head(rid).step for rid in second} == {1}
    learner.advance("covered", 1)
    for rid in (first[0], *more):
        desk.settle(rid)
        assert admitted() == 11
    for rid in second:
        desk.judge(rid)
    learner.call(fenced("publish", 9, 2, "v00000009.safetensors", "aa"))
    assert admitted() == 15
    third = desk.take()
    for rid in third:
        desk.judge(rid)
    learner.call(fenced("publish", 10, 3, "v00000010.safetensors", "aa"))
    assert admitted() == 15  # the run is over


def test_a_learner_that_fell_back_gets_new_rollouts_for_those_it_lost(begin: Callable[..., Desk]) -> None:
    desk = begin(deterministic=True, learner={"batch_size": 4, "max_steps": 10})
    learner = desk.run.lease("learner")
    for step in (1, 2):
        desk.go_on()
        for rid in desk.take():
            desk.judge(rid)
            learner.advance("covered", step)
            desk.settle(rid)
        learner.advance("step", step)
    desk.go_on()
    assert desk.run.ledger()["admitted"] == 12
    learner.advance("step", 0)  # both checkpoints were torn: 8 were trained for nothing, 4 are there
    learner.advance("covered", 0)
    for rid in desk.take():
        desk.judge(rid)
    desk.go_on()
    assert desk.run.ledger()["admitted"] == 12
    learner.advance("step", 1)
    desk.go_on()
    assert desk.run.ledger()["admitted"] == 16


# --- lines, by hand ---


def test_a_trained_rollouts_line(desk: Desk) -> None:
    desk.go_on()
    rid = desk.take()[0]
    desk.judge(rid, finish_reason="kl_trap", cut=True, trigger=2, keep=1, train=1, generated=None, threshold=0.25)
    desk.count(rid, 7)
    desk.settle(rid, staleness=3)
    desk.go_on()
    line = desk.lines()[rid]
    assert (line["ending"], line["reason"], line["finish_reason"]) == ("trained", "", "kl_trap")
    assert (line["tokens_kept"], line["tokens_detection"], line["tokens_overshoot"]) == (1, 1, 5)
    assert (line["tokens_generated"], line["tokens_trained"], line["staleness"]) == (7, 1, 3)
    assert (line["active"], line["threshold"], line["min_window"], line["correct"]) == (True, 0.25, 0.125, True)
    assert (line["policy_version_first"], line["policy_version_last"]) == (0, 1)
    assert desk.run.plane.rollout(rid) == {}
    assert desk.run.entries("finished") == []


def test_a_line_says_when_by_the_clock_of_redis(desk: Desk) -> None:
    began = desk.run.client.time()[0]
    desk.go_on()
    rid = desk.take()[0]
    time.sleep(0.02)
    desk.judge(rid)
    time.sleep(0.02)
    desk.settle(rid)
    desk.go_on()
    line = desk.lines()[rid]
    assert (
        began
        <= line["admitted_unix_s"]
        < line["verdict_unix_s"]
        < line["ended_unix_s"]
        <= desk.run.client.time()[0] + 1
    )
    assert line["verdict_unix_s"] - line["admitted_unix_s"] >= 0.02


def test_the_limits_for_alerts_are_served(desk: Desk) -> None:
    desk.go_on()
    desk.waited(HOUSEKEEPING_S)
    wanted = {"batch_size": 4, "max_staleness": 1, "max_steps": 100, "concurrency": 6}
    assert {kind: REGISTRY.get_sample_value("katana_config_value", {"kind": kind}) for kind in wanted} == wanted
    assert REGISTRY.get_sample_value("katana_rollouts_open") == 6
    assert REGISTRY.get_sample_value("katana_stream_outstanding", {"stream": "dead", "teacher": ""}) == 0
    used = desk.run.client.info("memory")
    ratio = REGISTRY.get_sample_value("katana_redis_memory_ratio")
    assert ratio == pytest.approx(used["used_memory"] / used["maxmemory"] if used["maxmemory"] else 0, rel=0.2)


def test_a_dropped_rollouts_line_trains_nothing(desk: Desk) -> None:
    desk.go_on()
    rid = desk.take()[1]
    desk.judge(rid, problem=1, threshold=None)
    desk.settle(rid, "dropped", "stale", 6)
    desk.go_on()
    line = desk.lines()[rid]
    assert (line["ending"], line["reason"], line["staleness"]) == ("dropped", "stale", 6)
    assert (line["tokens_generated"], line["tokens_kept"], line["tokens_trained"]) == (3, 3, 0)
    assert (line["active"], line["correct"]) == (False, False)
    assert desk.run.ledger()["dropped:stale"] == 1


def test_a_rollout_that_died_unjudged_is_booked_from_its_record(desk: Desk) -> None:
    desk.go_on()
    rids = desk.take()
    rid = (
        next(rid for rid in rids if desk.head(rid).arm == "control")
        if any(desk.head(rid).arm == "control" for rid in rids)
        else rids[-1]
    )
    head = desk.head(rid)
    desk.write(rid, tokens=4, finish=None)
    desk.die(rid)
    desk.go_on()
    line = desk.lines()[rid]
    assert (line["ending"], line["reason"], line["finish_reason"]) == ("dead", "rollout", "unfinished")
    assert (line["arm"], line["problem"], line["tokens_generated"]) == (head.arm, head.problem, 4)
    assert desk.run.ledger()["dead"] == 1


def test_broken_counts_in_a_record_are_booked_all_the_same(begin: Callable[..., Desk]) -> None:
    desk = begin(feeder={"concurrency": 6, "record_audit": True})
    desk.go_on()
    rid, other = desk.take()[:2]
    for one in (rid, other):
        desk.write(one, tokens=4, finish=None)
        desk.die(one)
    broken = {"length": "4x", "chunks": b"\xff", "owners": "n1 zero "}
    desk.run.client.hset(desk.run.key(f"rollout:{rid}"), mapping=broken)
    desk.restart()
    desk.go_on()
    assert (desk.lines()[rid]["ending"], desk.lines()[rid]["tokens_generated"]) == ("dead", 0)
    assert desk.lines()[other]["tokens_generated"] == 4
    audits = {one["rid"]: one for one in read_lines(desk.run.config.run_dir / "audit.jsonl")}
    assert audits[rid]["owners"] == audits[other]["owners"] == [["n1", 0]]
    assert audits[rid]["chunks"] == audits[other]["chunks"]
    assert len(audits[rid]["chunks"]) == 1
    assert desk.run.ledger()["dead"] == 2


# --- counts that come late, or never ---


def test_a_stopped_rollout_is_booked_when_its_writers_count_has_come(desk: Desk) -> None:
    desk.go_on()
    rid = desk.take()[0]
    desk.judge(rid, generated=None)
    desk.settle(rid)
    desk.go_on()
    assert desk.lines() == {}
    desk.count(rid, 9)
    desk.go_on()
    assert desk.lines()[rid]["tokens_generated"] == 9


def test_without_a_count_the_stored_chunks_count_and_a_late_one_changes_nothing(desk: Desk) -> None:
    desk.go_on()
    rid, other = desk.take()[:2]
    desk.write(rid, tokens=5, finish=None)
    desk.judge(rid, generated=None)
    desk.settle(rid)
    desk.go_on()
    assert desk.lines() == {}
    desk.waited(COUNT_WAIT_S)
    assert desk.lines()[rid]["tokens_generated"] == 5
    desk.run.client.xadd(desk.run.key("finished"), {"kind": "count", "rid": rid, "generated": "9"})
    desk.go_on()
    assert desk.lines()[rid]["tokens_generated"] == 5
    assert desk.run.entries("finished") == []
    assert other not in desk.lines()


# --- crashes ---


def test_a_new_feeder_continues_at_the_cursor(desk: Desk) -> None:
    desk.go_on()
    desk.restart()
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 6}
    for rid in desk.take():
        desk.judge(rid)
    desk.restart()
    desk.go_on()
    assert desk.run.ledger() == {"admitted": 8}
    assert desk.take() == ["r000000006", "r000000007"]


class Crash(Exception):
    pass


@contextmanager
def crashing_before_the_line(desk: Desk) -> Iterator[None]:
    def crash(bookings: Any) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk.feeder.books, "write", crash)
        yield


@contextmanager
def crashing_at(desk: Desk, script: str, after: int = 0) -> Iterator[None]:
    """A feeder that dies when it runs a script, once Redis has carried out so many of the trip's calls."""
    each = desk.run.plane.call_all

    def dying(calls: Sequence[Any]) -> Any:
        if any(call.script == script for call in calls):
            each(calls[:after])
            raise Crash
        return each(calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk.run.plane, "call_all", dying)
        yield


def test_a_crash_between_the_line_and_the_script_books_once(desk: Desk) -> None:
    desk.go_on()
    a, b = desk.take()[:2]
    desk.judge(a)
    desk.settle(a)
    with crashing_at(desk, "book"), pytest.raises(Crash):
        desk.go_on()
    assert list(desk.lines()) == [a]
    assert desk.run.ledger() == {"admitted": 6}
    desk.restart()
    desk.go_on()
    assert list(desk.lines()) == [a]
    assert desk.run.ledger() == {"admitted": 7, "trained": 1}
    assert desk.run.entries("finished") == []
    assert desk.run.client.sismember(desk.run.key("open"), a) == 0
    desk.judge(b)
    desk.settle(b)
    desk.go_on()
    assert list(desk.lines()) == [a, b]


def test_a_crash_before_the_line_loses_nothing(desk: Desk) -> None:
    desk.go_on()
    rid = desk.take()[0]
    desk.judge(rid)
    desk.settle(rid)
    with crashing_before_the_line(desk), pytest.raises(Crash):
        desk.go_on()
    desk.restart()
    desk.go_on()
    assert desk.lines()[rid]["ending"] == "trained"


def test_a_torn_last_line_is_written_again(desk: Desk) -> None:
    desk.go_on()
    a, b = desk.take()[:2]
    desk.judge(a)
    desk.settle(a)
    desk.go_on()
    desk.judge(b)
    desk.settle(b)
    desk.kill()
    with (desk.run.config.run_dir / "rollouts.jsonl").open("ab") as file:
        file.write(f'{{"rid":"{b}","arm":"trea'.encode())
    desk.restart()
    desk.go_on()
    assert sorted(desk.lines()) == sorted([a, b])
    assert (desk.run.config.run_dir / "rollouts.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.slow
def test_a_crash_while_the_run_is_closed_drops_what_was_in_flight_once(desk: Desk) -> None:
    desk.go_on()
    desk.finish_run()
    with crashing_at(desk, "book", after=2), pytest.raises(Crash):
        desk.feeder.finish()
    desk.kill()
    desk.new().run()
    assert desk.run.ledger() == {"admitted": 6, "dropped:run_end": 6}
    assert {line["reason"] for line in desk.lines().values()} == {"run_end"}
    assert len(desk.lines()) == 6


def test_a_former_feeder_books_and_admits_nothing(desk: Desk) -> None:
    desk.go_on()
    old = desk.feeder
    old_lines = desk.run.config.run_dir / "rollouts.jsonl"
    desk.run.client.delete(desk.run.key("lease:feeder"))
    new = Lease(desk.run.plane, "feeder", 600.0)
    new.acquire(threading.Event())
    rids = desk.take()
    for rid in rids:
        desk.judge(rid)
    with pytest.raises(LeaseLost):
        old.step(block_s=0.001)
    assert desk.run.ledger() == {"admitted": 6}
    assert old_lines.read_bytes() == b""


# --- what is broken ---


@pytest.mark.parametrize("rid", ["r999999999", "r5", "r0", "x7"])
def test_an_ending_of_a_rollout_that_was_never_admitted_is_given_up(desk: Desk, rid: str) -> None:
    desk.go_on()
    fields = {"kind": "ending", "rid": rid, "ending": "dead", "reason": "sold"}
    desk.run.client.xadd(desk.run.key("finished"), fields)
    desk.go_on()
    assert desk.lines() == {}
    assert [letter["stage"] for letter in desk.run.entries("dead")] == ["finished"]
    assert desk.run.entries("finished") == []
    desk.restart()
    assert desk.run.ledger() == {"admitted": 6}


def test_a_feeder_that_took_over_later_keeps_its_ledger_on_disk(desk: Desk) -> None:
    desk.go_on()
    former = desk.feeder
    desk.run.client.delete(desk.run.key("lease:feeder"))
    desk.feeder = desk.begin()
    for rid in desk.take():
        desk.judge(rid)
    desk.waited(HOUSEKEEPING_S)
    path = desk.run.config.run_dir / "ledger.json"
    late = json.loads(path.read_text())
    assert (former.ledger.fields["admitted"], late["admitted"]) == (6, 8)
    former.close()
    assert json.loads(path.read_text()) == late


def test_a_redis_that_went_back_is_distinguished_from_one_that_lost_all(desk: Desk) -> None:
    """Rollouts admitted in the lost second are booked as lost; those that Redis still has continue."""
    desk.go_on()
    gone = rid_of(5)
    run = desk.run
    run.client.set(run.key("cursor"), 5)
    run.client.srem(run.key("open"), gone)
    run.client.delete(run.key(f"rollout:{gone}"))
    run.client.hset(run.key("ledger"), "admitted", 5)
    desk.waited(HOUSEKEEPING_S)
    desk.restart()
    assert {rid: line["reason"] for rid, line in desk.lines().items()} == {gone: "lost"}
    assert run.plane.cursors()[0] == 6
    assert run.client.scard(run.key("open")) == 5


@pytest.mark.parametrize("how", ["lost all", "went back"])
def test_tokens_generated_are_restored_from_the_books_and_the_records_of_the_living(desk: Desk, how: str) -> None:
    desk.go_on()
    run = desk.run
    whole, cut, booked, writing, *_ = desk.take()
    for rid in (whole, booked):
        desk.write(rid)  # 3 tokens
        desk.judge(rid)
        desk.settle(rid)
    desk.write(cut, tokens=5, finish=None)
    desk.judge(cut, generated=None, cut=True, finish_reason="kl_trap", trigger=3, keep=2, train=2)
    desk.count(cut, 9)
    desk.settle(cut)
    desk.go_on()
    desk.write(writing, tokens=4, finish=None)
    assert {rid: line["tokens_generated"] for rid, line in desk.lines().items()} == {whole: 3, booked: 3, cut: 9}
    assert run.plane.generated() == 3 + 3 + 9 + 4
    desk.waited(HOUSEKEEPING_S)
    admitted = run.plane.cursors()[0]
    if how == "lost all":
        for name in list(run.client.scan_iter(run.plane.prefix.replace("{", "[{]") + "*")):
            run.client.delete(name)
        create_run(run.client, run.config, run.plane.run_key)
    else:  # by a moment, in which a rollout was booked and the newest was admitted
        run.client.set(run.key("cursor"), admitted - 1)
        run.client.sadd(run.key("open"), booked)
        run.client.hset(run.key(f"rollout:{booked}"), "length", 3)
        run.client.hset(run.key("policy"), "generated", 1)
    desk.restart()
    assert run.plane.generated() == 3 + 3 + 9 + (4 if how == "went back" else 0)
    assert run.plane.cursors()[0] == admitted


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "count", "rid": "r000000000"},
        {"kind": "count", "rid": "r000000000", "generated": "-1"},
        {"kind": "verdict", "rid": "r000000000", "body": b"\xc1"},
        {"kind": "ending", "rid": "r000000000", "ending": "vanished"},
        {"kind": "ending", "rid": "r000000000", "ending": "trained", "staleness": "x"},
        {"kind": "what", "rid": "r000000000"},
        {"kind": "count", "generated": "3"},
        {"kind": "verdict", "rid": "r000000000", "body": make_verdict("r000000001").encode()},
    ],
)
def test_an_entry_that_cannot_be_read_is_given_up_and_the_rest_flows(desk: Desk, fields: dict[str, Any]) -> None:
    desk.go_on()
    rid = desk.take()[0]
    desk.run.client.xadd(desk.run.key("finished"), fields)
    desk.judge(rid)
    desk.settle(rid)
    desk.go_on()
    assert desk.lines()[rid]["tokens_generated"] == 3
    assert len(desk.run.client.xrange(desk.run.key("dead"))) == 1
    assert desk.run.pending("finished") == 0


def test_an_ending_before_its_verdict_waits_for_it(desk: Desk) -> None:
    """Entries are read in order, but a group that was made again may hand them out in any."""
    desk.go_on()
    rid = desk.take()[0]
    desk.run.client.xadd(
        desk.run.key("finished"), {"kind": "ending", "rid": rid, "ending": "trained", "reason": "", "staleness": "0"}
    )
    desk.go_on()
    assert desk.lines() == {}
    desk.judge(rid)
    desk.go_on()
    assert desk.lines()[rid]["tokens_trained"] == 3


# --- what an operator sent back ---


def bury(desk: Desk, *rids: str) -> None:
    for rid in rids:
        desk.die(rid)
    desk.go_on()


def send_back(desk: Desk, rid: str) -> None:
    problem = desk.head(rid).problem
    for entry, values in desk.run.client.xrange(desk.run.key("dead")):
        if values[b"rid"] == rid.encode():
            assert desk.run.plane.call(script("again", entry, rid, problem)) == [b"ok"]


def test_what_is_sent_back_is_a_new_admission_of_the_same_problem(begin: Callable[..., Desk]) -> None:
    desk = begin(feeder={"concurrency": 6}, data={"num_generations": 2})
    desk.go_on()
    bury(desk, "r000000003")
    assert desk.run.ledger() == {"admitted": 7, "dead": 1}
    send_back(desk, "r000000003")
    desk.go_on()
    assert desk.run.entries("again") == [{"rid": "r000000003", "problem": "1"}]  # until there is room
    bury(desk, "r000000000", "r000000001")
    assert desk.run.ledger() == {"admitted": 9, "dead": 3}
    assert desk.run.entries("again") == []
    assert (desk.head("r000000007").problem, desk.head("r000000008").problem) == (1, 4)
    assert desk.head("r000000007").prompt.tolist() == [2]
    assert desk.head("r000000007").seed != head_of(desk.run.config, desk.source, 3).seed
    assert desk.run.field("r000000007", "problem") == b"1"
    assert desk.run.field("r000000008", "problem") is None
    bury(desk, "r000000007")  # it may die again, and be sent back again
    send_back(desk, "r000000007")
    bury(desk, "r000000002")
    assert desk.head("r000000010").problem == 1
    desk.finish_run()
    desk.feeder.finish()
    assert Ledger.of(desk.feeder.ledger.fields) == Ledger(
        admitted=11, trained=0, dropped={"run_end": 6}, dead=5, open=0
    )
    assert sorted(desk.lines()) == [f"r{number:09d}" for number in range(11)]
    assert desk.lines()["r000000003"]["ending"] == "dead"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_around_the_script_admits_what_was_sent_back_once(desk: Desk, when: str) -> None:
    desk.go_on()
    bury(desk, "r000000001", "r000000002")
    send_back(desk, "r000000001")
    send_back(desk, "r000000002")
    desk.die("r000000003")
    with crashing_at(desk, "admit", after=when == "after"), pytest.raises(Crash):
        desk.go_on()
    assert len(desk.run.entries("again")) == (2 if when == "before" else 1)
    desk.restart()
    desk.go_on()
    bury(desk, "r000000004", "r000000005")
    assert desk.run.entries("again") == []
    assert desk.run.ledger() == {"admitted": 11, "dead": 5}
    resent = [desk.head(f"r{number:09d}") for number in range(8, 11)]
    assert [head.problem for head in resent] == [1, 2, 10]


def test_a_full_redis_keeps_what_was_sent_back(desk: Desk) -> None:
    desk.go_on()
    bury(desk, "r000000001")
    send_back(desk, "r000000001")
    with a_full_redis(desk):
        bury(desk, "r000000002")
    assert len(desk.run.entries("again")) == 1
    desk.waited(ROOM_S)
    assert desk.head("r000000007").problem == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rid": "r000000001"}, "again.problem: not a number"),
        ({"problem": "-1"}, "again.problem: not a number"),
        ({"problem": "4000"}, "problem 4000: the prompt is too long"),
    ],
)
def test_a_request_that_cannot_be_admitted_is_given_up_and_the_rest_flows(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], told: str
) -> None:
    each = desk.source.prompt

    def bounded(problem: int) -> Ints:
        if problem >= 4000:
            raise ValueError(f"problem {problem}: the prompt is too long")
        return each(problem)

    monkeypatch.setattr(desk.source, "prompt", bounded)
    desk.run.client.xadd(desk.run.key("again"), fields)
    desk.run.client.xadd(desk.run.key("again"), {"problem": "70"})
    desk.go_on()
    assert desk.run.entries("again") == []
    [letter] = desk.run.entries("dead")
    assert (letter["rid"], letter["stage"], letter["reason"]) == ("", "again", told)
    assert desk.run.ledger() == {"admitted": 6}
    assert [desk.head(rid).problem for rid in desk.take()] == [70, 1, 2, 3, 4, 5]


# --- the invariant ---


ENDINGS = {
    "trained": ("trained", ""),
    "cut": ("trained", ""),
    "stale": ("dropped", "stale"),
    "empty": ("dropped", "empty"),
    "dead": ("dead", "rollout"),
    "abandoned": ("dropped", "run_end"),
}


class Fates:
    """Rollouts with fates drawn from a seed, and a feeder that is killed, and crashes, at places drawn from it."""

    def __init__(self, desk: Desk, seed: int) -> None:
        self.desk, self.rng = desk, np.random.default_rng(seed)
        self.fates: dict[str, str] = {}
        self.waiting: list[str] = []
        self.uncounted: list[str] = []
        self.settled = self.crashes = 0

    def begin(self, rid: str) -> None:
        fate = str(self.rng.choice(list(ENDINGS)))
        if fate == "abandoned" and list(self.fates.values()).count("abandoned") == 4:
            fate = "trained"
        self.fates[rid] = fate
        self.desk.write(rid, finish=None)
        if fate == "dead":
            self.desk.die(rid)
        elif fate == "empty":
            self.desk.judge(rid, keep=0, train=0, trigger=2)
        elif fate != "abandoned":
            self.desk.judge(rid, generated=None if fate == "cut" else 3)
            self.waiting.append(rid)
            self.uncounted += [rid] * (fate == "cut")

    def settle(self, most: int) -> None:
        self.rng.shuffle(self.waiting)
        for _ in range(min(most, len(self.waiting))):
            rid = self.waiting.pop()
            self.desk.settle(rid, *ENDINGS[self.fates[rid]])
            self.settled += 1
        self.desk.run.lease("learner").advance("step", self.settled // 6)

    def count(self) -> None:
        while self.uncounted and self.rng.random() < 0.7:
            rid = self.uncounted.pop()
            if self.desk.run.field(rid, "owner"):
                self.desk.count(rid, 3 + int(self.rng.integers(0, 4)))

    def strike(self) -> AbstractContextManager[None]:
        """What may befall a feeder: it is killed now, or crashes at its next booking, before the line or after it."""
        event = self.rng.random()
        if event < 0.3:
            self.desk.restart()
        elif event < 0.4:
            return crashing_at(self.desk, "book")
        elif event < 0.5:
            return crashing_before_the_line(self.desk)
        return nullcontext()

    def round(self) -> None:
        try:
            with self.strike():
                self.desk.go_on()
        except Crash:
            self.crashes += 1
            self.desk.restart()
        for rid in self.desk.take():
            self.begin(rid)
        self.settle(int(self.rng.integers(0, 6)))
        self.count()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_admitted_rollout_ends_exactly_once_as_trained_dropped_with_a_reason_or_dead(
    begin: Callable[..., Desk], seed: int
) -> None:
    desk = begin(feeder={"concurrency": 8}, learner={"batch_size": 6, "max_staleness": 2, "max_steps": 100})
    fates = Fates(desk, seed)
    for _ in range(30):
        fates.round()
    fates.settle(1000)
    desk.finish_run()
    desk.kill()
    desk.new().run()

    lines, ledger = desk.lines(), desk.run.ledger()
    admitted = ledger.pop("admitted")
    assert admitted > 40
    assert fates.crashes >= 1
    assert sorted(lines) == [f"r{number:09d}" for number in range(admitted)]
    for rid, line in lines.items():
        assert (line["ending"], line["reason"]) == ENDINGS[fates.fates.get(rid, "abandoned")]
        spent = line["tokens_kept"] + line["tokens_detection"] + line["tokens_overshoot"]
        assert line["tokens_generated"] == spent
        assert line["tokens_trained"] == (line["tokens_kept"] if line["ending"] == "trained" else 0)
    assert admitted == sum(ledger.values())
    assert ledger == Counter(
        f"dropped:{line['reason']}" if line["ending"] == "dropped" else line["ending"] for line in lines.values()
    )
    written = json.loads((desk.run.config.run_dir / "ledger.json").read_text())
    dropped = {name.removeprefix("dropped:"): value for name, value in ledger.items() if name.startswith("dropped:")}
    assert (written["admitted"], written["trained"], written["dead"]) == (admitted, ledger["trained"], ledger["dead"])
    assert (written["dropped"], written["open"]) == (dropped, 0)
    assert desk.run.client.scard(desk.run.key("open")) == 0
    assert desk.run.plane.state() == "ended"
    assert desk.run.pending("finished") == 0


def test_the_whole_loop_returns_when_the_run_is_over_and_lets_go_of_its_lease(desk: Desk) -> None:
    desk.kill()
    desk.new().run(until_idle=True)
    assert desk.run.ledger() == {"admitted": 6}
    assert desk.run.client.exists(desk.run.key("lease:feeder")) == 0
    written = json.loads((desk.run.config.run_dir / "ledger.json").read_text())
    assert written == {"admitted": 6, "trained": 0, "dropped": {}, "dead": 0, "open": 6}


def test_a_booking_whose_answer_is_lost_is_counted_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.go_on()
    (rid, *_) = desk.take()
    desk.write(rid)
    desk.judge(rid)
    desk.settle(rid)
    patiently, lost = desk.run.plane.patiently, []

    def losing(action: Any, what: str, *kind: Any) -> Any:
        def once() -> Any:
            answer = action()
            if what == "book" and not lost:
                lost.append(answer)
                raise redis.exceptions.ConnectionError("the answer is lost")
            return answer

        return patiently(once, what, *kind)

    monkeypatch.setattr(desk.run.plane, "patiently", losing)
    desk.go_on()
    assert lost
    assert desk.run.ledger()["trained"] == 1
    assert desk.feeder.ledger.fields["trained"] == 1


@pytest.mark.parametrize(
    ("policy", "without", "with_number"),
    [
        ("none", False, False),
        ("fixed", True, True),
        ("scheduled", True, True),
        ("random", True, True),
        ("random_matched", False, True),
        ("repetition", True, True),
        ("kat", False, True),
        ("kat_absolute", False, True),
        ("kat_inverse", False, True),
        ("entropy", False, True),
        ("margin_change", False, True),
        ("adaptive", False, True),
        ("own_policy:Halved", True, True),
    ],
)
@pytest.mark.parametrize("how", [{}, {"apply": "mask"}, {"shadow": True}], ids=["stop", "mask", "shadow"])
def test_lines_say_whether_their_policy_could_have_cut(
    begin: Callable[..., Desk], policy: str, without: bool, with_number: bool, how: dict[str, Any]
) -> None:
    desk = begin(termination={"policy": policy, "hazard": {9: 0.5}, "scheduled_tokens": 64, **how})
    desk.go_on()
    first, second = desk.take()[:2]
    for rid, number in ((first, None), (second, 64.0)):
        # The rule fired, and what it says was not done: all three tokens were written.
        desk.judge(rid, threshold=number, trigger=2, keep=1, train=1, cut=False, generated=3, finish_reason="eos")
        desk.settle(rid)
    desk.go_on()
    lines = desk.lines()
    assert (lines[first]["active"], lines[second]["active"]) == (without, with_number)
    for line in (lines[first], lines[second]):
        assert (line["tokens_kept"], line["tokens_detection"], line["tokens_overshoot"]) == (1, 1, 1)
        assert line["tokens_generated"] == 3
