"""Feeder and arbiter on three data servers: partial trips, a server without its data, minima and thresholds."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import make_config, make_divergence, make_logprobs, make_score_support, make_support, make_tokens

from actors.arbiter import Arbiter
from actors.feeder import HOUSEKEEPING_S, Feeder, head_of
from common.config import Config
from common.rids import number_of, rid_of
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.messages import Ints
from common.wire.plane import Plane, RunGone
from common.wire.planes import create_on, open_planes
from ops.reach.embedded import EmbeddedRedis


class Same:
    """The same prompt for every problem."""

    def prompt(self, problem: int) -> Ints:
        return np.array([5, 6, 7], np.int32)

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        return None


class Scene:
    """Three servers, a feeder and an arbiter; workers and learner are played."""

    def __init__(self, servers: list[EmbeddedRedis], folder: Path) -> None:
        self.clients: list[Any] = [connect(server.url) for server in servers]
        self.config: Config = make_config(
            folder,
            redis={"data": [server.url for server in servers]},
            learner={"batch_size": 4, "max_staleness": 4},
            feeder={"concurrency": 12},
            termination={"min_calibration": 2, "calibrate_on": "all", "policy": "kat"},
        )
        create_on(self.clients, self.config, "spread")
        self.planes = self.plane()
        self.now = 0.0
        self.feeder = self.begin()

    def plane(self) -> Plane:
        return open_planes(self.config, self.clients, "spread")

    def begin(self) -> Feeder:
        feeder = Feeder(self.config, self.plane(), Same(), threading.Event(), clock=lambda: self.now)
        feeder.open()
        return feeder

    def go_on(self) -> None:
        self.now += HOUSEKEEPING_S
        while self.feeder.step(block_s=0.001):
            pass

    def kill(self) -> None:
        """Without its last words; only the leases run out."""
        self.feeder.books.close()
        self.drop("feeder")

    def drop(self, role: str) -> None:
        for part in self.planes.parts:
            part.client.delete(part.key(f"lease:{role}"))

    def restart(self) -> None:
        self.kill()
        self.feeder = self.begin()

    def write_and_score(self, length: int = 16, value: float = 0.5) -> list[str]:
        """All that waits in `prompts`, to its end."""
        given = self.planes.call_all([scripts.take("w1", "n1", 100, 0, b"0-0", place) for place in self.planes.places])
        rids = [bytes(offer.rid or b"").decode() for one in given for offer in one.offers]
        for rid in rids:
            support, student = make_support(length).encode(), make_logprobs(length).encode()
            record = make_tokens([1 + n % 9 for n in range(length)], finish="eos").encode()
            call = scripts.chunk(rid, "n1", 0, record, support, student, self.planes.shard_of(rid), length, "eos")
            assert self.planes.call(call).word is scripts.ChunkAnswer.OK
        shards = [f"chunks:{shard}" for shard in range(self.planes.shards)]
        while came := self.planes.read("teacher", "t1", shards, count=100, block_s=0.0):
            for stream, (entry, values) in came:
                divergence = make_divergence([value] * length).encode()
                shard, rid = int(stream.partition(":")[2]), values[b"rid"].decode()
                call = scripts.score(shard, entry, rid, 0, divergence, make_score_support(length).encode())
                assert self.planes.call(call) is scripts.ScoreAnswer.OK
        return rids

    def train_all(self, learner: Lease) -> int:
        count = 0
        while came := self.planes.read("learner", learner.token, ["trajectories"], count=100, block_s=0.0):
            endings = [
                scripts.Ending(entry, values[b"rid"].decode(), "trained", staleness=0) for _, (entry, values) in came
            ]
            for some in self.planes.by_server(endings, lambda one: one.rid):
                count += learner.call(scripts.settle(some))
        return count

    @property
    def prompts(self) -> list[str]:
        """Every rollout that a server was ever given a prompt of and still holds."""
        return [
            values[b"rid"].decode()
            for part in self.planes.parts
            for _, values in part.client.xrange(part.key("prompts"))
        ]

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        path = self.config.run_dir / "rollouts.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len({line["rid"] for line in found}) == len(found)
        return {line["rid"]: line for line in found}


@pytest.fixture
def scene(three_servers: list[EmbeddedRedis], tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(three_servers, tmp_path / "runs")
    yield scene
    scene.feeder.books.close()


@pytest.mark.parametrize("reached", [(0,), (2,), (0, 2), (1, 2), ()], ids=str)
def test_a_trip_that_reached_some_servers_is_made_up_for(scene: Scene, reached: tuple[int, ...]) -> None:
    """The feeder was killed in the middle of an admission; the next one admits what is missing and nothing twice."""
    scene.go_on()
    before = set(scene.prompts)
    assert before == {rid_of(number) for number in range(12)}
    lease = scene.feeder._lease
    for number, cursor in scene.feeder._cursors.upcoming(9):
        head = head_of(scene.config, Same(), number)
        if scene.planes.place_of(head.rid) in reached:
            assert lease.call(scripts.admit(head.rid, head.encode(), cursor)) is scripts.Admitted.OK
    came = len(scene.prompts) - 12
    scene.restart()
    assert scene.feeder.ledger.fields["admitted"] == 12 + came
    # Room for more, whatever was admitted beyond the number that is next.
    scene.feeder._config = scene.config.model_copy(
        update={"feeder": scene.config.feeder.model_copy(update={"concurrency": 20})}
    )
    scene.go_on()
    after = Counter(scene.prompts)
    assert set(after.values()) == {1}
    numbers = sorted(number_of(rid) for rid in after)
    assert len(numbers) == 20 == scene.planes.ledger()["admitted"]
    assert scene.planes.open_rollouts() == sorted(after)
    holes = set(range(numbers[-1] + 1)) - set(numbers)
    assert all(scene.planes.place_of(rid_of(number)) not in reached for number in holes)
    scene.restart()
    assert scene.feeder.ledger.fields["admitted"] == 20


def test_admission_that_one_server_refuses_goes_on_at_the_others(scene: Scene) -> None:
    """A server that is full refuses; the run's next number stays the first that is missing."""
    full = scene.planes.parts[1]
    full.client.config_set("maxmemory", 1 << 20)
    scene.feeder._fitting = lambda count: count  # type: ignore[method-assign]  # it filled up after the feeder looked
    scene.go_on()
    admitted = {number_of(rid) for rid in scene.prompts}
    assert admitted and all(scene.planes.place_of(rid_of(number)) != 1 for number in admitted)
    first = next(number for number in range(100) if scene.planes.place_of(rid_of(number)) == 1)
    assert scene.feeder._cursors.next == first
    assert scene.planes.ledger()["admitted"] == len(admitted) == scene.feeder.ledger.fields["admitted"]
    full.client.config_set("maxmemory", 256 << 20)
    scene.now += 1.0
    scene.restart()
    scene.go_on()
    assert set(Counter(scene.prompts).values()) == {1}


def test_a_server_that_lost_its_data_loses_its_own_rollouts_only(scene: Scene) -> None:
    scene.go_on()
    admitted = scene.planes.open_rollouts()
    lost = [rid for rid in admitted if scene.planes.place_of(rid) == 1]
    scene.now += HOUSEKEEPING_S
    scene.feeder.step(block_s=0.001)  # its ledger is on disk
    scene.clients[1].flushdb()
    with pytest.raises(RunGone):
        scene.go_on()
        scene.feeder.step(block_s=0.001)
        scene.feeder._lease._renew()
    scene.kill()
    create_on(scene.clients, scene.config, "spread")
    scene.feeder = scene.begin()
    assert {rid: line["reason"] for rid, line in scene.lines.items()} == dict.fromkeys(lost, "lost")
    scene.go_on()
    ledger = scene.planes.ledger()
    assert ledger["dropped:lost"] == len(lost)
    assert len(scene.planes.open_rollouts()) == ledger["admitted"] - len(lost)
    assert not set(lost) & set(scene.planes.open_rollouts()), "no number is used twice"
    assert set(admitted) - set(lost) <= set(scene.planes.open_rollouts()), "the others are as they were"


def test_a_rollout_that_is_sent_back_is_admitted_where_its_letter_was(scene: Scene) -> None:
    scene.go_on()
    victims = [
        next(rid for rid in scene.planes.open_rollouts() if scene.planes.place_of(rid) == place) for place in (2, 0)
    ]
    for rid in victims:
        assert scene.planes.fail(rid, "rollout", "poison", max_attempts=1)
    scene.go_on()
    assert {rid: line["ending"] for rid, line in scene.lines.items()} == dict.fromkeys(victims, "dead")
    letters = scene.planes.dead_letters("-", "+", 10)
    assert {values[b"rid"].decode() for _, values in letters} == set(victims)
    for entry, values in letters:
        answer = scene.planes.send_back(entry.decode(), values[b"rid"].decode(), 77)
        assert answer is scripts.SentBack.OK
    assert scene.planes.requests_waiting() == 2
    learner = Lease(scene.planes, "learner", 600.0)
    learner.acquire(threading.Event())
    for _ in range(4):  # room for more, until both servers' turns have come
        scene.write_and_score()
        Arbiter(scene.config, scene.planes, threading.Event()).run(until_idle=True)
        scene.train_all(learner)
        scene.go_on()
    assert scene.planes.requests_waiting() == 0
    again = [rid for rid in scene.lines if scene.lines[rid]["problem"] == 77]
    waiting = [
        rid
        for rid, record in zip(
            scene.planes.open_rollouts(), scene.planes.rollouts(scene.planes.open_rollouts()), strict=True
        )
        if record.get(b"problem") == b"77"
    ]
    assert sorted(scene.planes.place_of(rid) for rid in [*again, *waiting]) == [0, 2]


def test_a_run_of_several_servers_ends_with_nothing_open_on_any(scene: Scene) -> None:
    learner = Lease(scene.planes, "learner", 600.0)
    learner.acquire(threading.Event())
    for _ in range(3):
        scene.go_on()
        scene.write_and_score()
        Arbiter(scene.config, scene.planes, threading.Event()).run(until_idle=True)
        assert scene.train_all(learner) > 0
    scene.go_on()
    learner.advance("state", "trained")
    scene.feeder._clock = Ticking()
    scene.feeder.finish()
    ledger = scene.planes.ledger()
    assert ledger["admitted"] == ledger["trained"] + ledger["dropped:run_end"] == len(scene.lines)
    assert [part.state() for part in scene.planes.parts] == ["ended"] * 3
    for part in scene.planes.parts:
        assert part.open_rollouts() == []
        assert all(part.client.xlen(part.key(stream)) == 0 for stream, _ in part.groups)


class Ticking:
    """A clock that goes on by itself."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


# --- the arbiter ---


def test_minima_are_at_the_home_and_the_threshold_on_every_server(scene: Scene) -> None:
    scene.go_on()
    rids = scene.write_and_score(value=0.5)
    Arbiter(scene.config, scene.planes, threading.Event()).run(until_idle=True)
    assert all(record[b"verdict"] for record in scene.planes.rollouts(rids))
    lengths = [part.client.llen(part.key("minima")) for part in scene.planes.parts]
    assert lengths == [min(len(rids), scene.config.termination.buffer_size), 0, 0]
    thresholds = {part.threshold() for part in scene.planes.parts}
    assert len(thresholds) == 1 and thresholds != {b"inactive"}


def test_a_new_rollout_is_judged_by_the_threshold_whatever_its_server(scene: Scene) -> None:
    scene.go_on()
    scene.write_and_score(value=0.5)
    Arbiter(scene.config, scene.planes, threading.Event()).run(until_idle=True)
    in_force = scene.planes.threshold()
    learner = Lease(scene.planes, "learner", 600.0)
    learner.acquire(threading.Event())
    scene.train_all(learner)
    scene.go_on()
    rids = scene.write_and_score(value=0.25)
    assert {scene.planes.place_of(rid) for rid in rids} == {0, 1, 2}
    assert {record[b"threshold"] for record in scene.planes.rollouts(rids)} == {in_force}


def test_a_crash_between_verdicts_and_calibration_costs_minima_and_no_verdict(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.go_on()
    rids = scene.write_and_score()
    arbiter = Arbiter(scene.config, scene.planes, threading.Event())

    class Killed(Exception):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    arbiter.open()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(arbiter, "_calibrate", die)
        arbiter.step(block_s=0.0)
    scene.drop("arbiter")
    given = [record.get(b"verdict") for record in scene.planes.rollouts(rids)]
    assert any(given)
    assert scene.planes.minima() == []
    Arbiter(scene.config, scene.planes, threading.Event()).run(until_idle=True)
    after = [record[b"verdict"] for record in scene.planes.rollouts(rids)]
    assert [verdict for verdict in after if verdict in given] == [verdict for verdict in given if verdict], "unchanged"
    assert len(scene.planes.minima()) == len(rids) - sum(verdict is not None for verdict in given)
    trajectories = sum(part.client.xlen(part.key("trajectories")) for part in scene.planes.parts)
    assert trajectories == len(rids)


def test_a_calibration_that_is_repeated_adds_no_minimum_twice(scene: Scene) -> None:
    lease = Lease(scene.planes, "arbiter", 600.0)
    lease.acquire(threading.Event())
    for call in (scripts.calibrate(1, 4, 0.5, [0.1, 0.2], 0), scripts.calibrate(1, 4, 0.5, [0.1, 0.2], 0)):
        lease.call(call)
    assert scene.planes.minima() == [0.1, 0.2]
    lease.call(scripts.calibrate(2, 4, None, [0.3, 0.4, 0.5], 0))
    assert scene.planes.minima() == [0.2, 0.3, 0.4, 0.5]
    assert scene.planes.threshold() == b"inactive"
