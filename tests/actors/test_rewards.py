"""The real feeder on real Redis servers with rewards: each rollout is judged once, and its standing outlives whoever
could lose it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Run, make_config
from test_feeder import Counting, Desk
from test_several_servers import Scene

from common.config import Config
from common.rids import number_of, rid_of
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.messages import Ints
from common.wire.plane import RunGone
from common.wire.planes import create_on
from ops.reach.embedded import EmbeddedRedis


class Remembering(Counting):
    """As Counting, but the n-th rollout that is judged of a problem is right if n is even; it remembers the calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def judge(self, problem: int, tokens: Ints) -> bool:
        self.asked.append((problem, len(tokens)))
        return len(tokens) != 2


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def new(**overrides: Any) -> Desk:
        defaults: dict[str, Any] = {
            "learner": {"batch_size": 8, "max_staleness": 1, "max_steps": 100},
            "data": {"num_generations": 2},
            "reward": {"mode": "grpo"},
            "feeder": {"concurrency": 4},
        }
        desk = Desk(start(embedded_redis, **(defaults | overrides)))
        desk.kill()
        desk.source = Remembering()
        desk.feeder = desk.begin()
        desks.append(desk)
        return desk

    yield new
    for desk in desks:
        desk.feeder.books.close()


def standings(desk: Desk) -> dict[int, str]:
    found = desk.run.client.hgetall(desk.run.key("rewards"))
    return {number_of(name.decode()): value.decode() for name, value in found.items()}


def asked(desk: Desk) -> list[tuple[int, int]]:
    assert isinstance(desk.source, Remembering)
    return desk.source.asked


def verdict(desk: Desk, number: int, **changes: Any) -> None:
    rid = rid_of(number)
    desk.write(rid)
    desk.judge(rid, problem=desk.head(rid).problem, **changes)


def test_a_standing_is_stored_with_the_verdict_and_goes_with_the_last_booking(begin: Callable[..., Desk]) -> None:
    desk = begin()
    desk.go_on()
    assert desk.take() == [rid_of(number) for number in range(4)]
    verdict(desk, 0)
    desk.go_on()
    assert standings(desk) == {0: "right"}, "nobody has trained it, and the learner waits for this"
    desk.settle(rid_of(0))
    desk.go_on()
    assert desk.lines()[rid_of(0)]["reward"] == "right"
    assert standings(desk) == {0: "right"}, "its group is not over"
    verdict(desk, 1, tokens=np.array([1, 2], np.int32), divergence=np.ones(2, np.float32), trigger=2, keep=2, train=2)
    desk.settle(rid_of(1))
    desk.go_on()
    assert {rid: line["reward"] for rid, line in desk.lines().items()} == {rid_of(0): "right", rid_of(1): "wrong"}
    assert standings(desk) == {}, "both are booked"
    assert asked(desk) == [(0, 3), (0, 2)], "the books ask nobody a second time"
    assert [line["correct"] for line in desk.lines().values()] == [True, False]


@pytest.mark.parametrize(
    ("of_cut", "standing", "calls"), [("none", "cut", []), ("as_wrong", "wrong", []), ("kept", "wrong", [(0, 2)])]
)
def test_a_cut_rollout_is_judged_as_the_config_says(
    begin: Callable[..., Desk], of_cut: str, standing: str, calls: list[tuple[int, int]]
) -> None:
    desk = begin(reward={"mode": "grpo", "of_cut": of_cut})
    desk.go_on()
    desk.take()
    verdict(desk, 0, cut=True, finish_reason="kl_trap", trigger=3, keep=2, train=2)
    desk.go_on()
    assert standings(desk) == {0: standing}
    assert asked(desk) == calls
    desk.settle(rid_of(0))
    desk.go_on()
    line = desk.lines()[rid_of(0)]
    assert (line["reward"], line["correct"]) == (standing, True), "the books judge all that was scored, as ever"


def test_who_ends_without_a_verdict_has_a_standing_too(begin: Callable[..., Desk]) -> None:
    desk = begin()
    desk.go_on()
    desk.take()
    desk.die(rid_of(0))
    verdict(desk, 1, train=0, keep=0, trigger=0, cut=True, finish_reason="fixed")
    desk.go_on()
    assert desk.lines()[rid_of(1)]["reason"] == "empty"
    assert standings(desk) == {}, "both are booked"
    assert [desk.lines()[rid_of(number)]["reward"] for number in range(2)] == ["dead", "cut"]


def test_a_rollout_that_was_sent_back_is_no_member(begin: Callable[..., Desk]) -> None:
    desk = begin()
    desk.go_on()
    desk.take()
    desk.die(rid_of(3))
    desk.go_on()
    [(letter, _)] = desk.run.client.xrange(desk.run.key("dead"))
    assert desk.run.plane.send_back(letter.decode(), rid_of(3), 1) is scripts.SentBack.OK
    desk.die(rid_of(2))
    desk.go_on()
    assert desk.head(rid_of(4)).problem == 2
    assert desk.head(rid_of(5)).problem == 1, "its number is of group 2"
    desk.take()
    verdict(desk, 5)
    desk.go_on()
    assert standings(desk) == {5: "sent_back"}
    assert asked(desk) == []


def test_one_that_was_sent_back_and_died_again_takes_no_reward_from_its_numbers_group(
    begin: Callable[..., Desk],
) -> None:
    desk = begin(feeder={"concurrency": 1})
    desk.go_on()
    desk.take()
    desk.die(rid_of(0))
    desk.feeder.step(block_s=0.001)
    [(letter, _)] = desk.run.client.xrange(desk.run.key("dead"))
    assert desk.run.plane.send_back(letter.decode(), rid_of(0), 0) is scripts.SentBack.OK
    desk.die(rid_of(1))
    desk.go_on()
    assert desk.head(rid_of(2)).problem == 0
    desk.die(rid_of(2))
    desk.feeder.step(block_s=0.001)
    assert standings(desk)[2] == "sent_back"


@pytest.mark.parametrize("killed", ["before the verdict is read", "after it is stored", "after it is booked"])
def test_a_feeder_that_is_killed_loses_no_standing(begin: Callable[..., Desk], killed: str) -> None:
    desk = begin()
    desk.go_on()
    desk.take()
    verdict(desk, 0)
    if killed != "before the verdict is read":
        desk.go_on()
    if killed == "after it is booked":
        desk.settle(rid_of(0))
        desk.go_on()
    desk.restart()
    desk.go_on()
    assert standings(desk) == {0: "right"}
    verdict(desk, 1)
    desk.settle(rid_of(1))
    if killed != "after it is booked":
        desk.settle(rid_of(0))
    desk.go_on()
    assert [desk.lines()[rid_of(number)]["reward"] for number in range(2)] == ["right", "right"]
    assert standings(desk) == {}


def test_what_was_stored_first_stays_whatever_the_verifier_says_later(begin: Callable[..., Desk]) -> None:
    desk = begin()
    desk.go_on()
    desk.take()
    verdict(desk, 0)
    desk.kill()
    desk.run.lease("feeder").call(scripts.reward(rid_of(0), "unknown"))
    desk.restart()
    desk.go_on()
    desk.settle(rid_of(0))
    desk.go_on()
    assert desk.lines()[rid_of(0)]["reward"] == "unknown"


def test_standings_of_groups_that_are_over_do_not_outlive_a_feeder_that_was_killed(begin: Callable[..., Desk]) -> None:
    desk = begin()
    desk.go_on()
    desk.take()
    for number in range(2):
        verdict(desk, number)
        desk.settle(rid_of(number))
    desk.go_on()
    desk.run.client.hset(desk.run.key("rewards"), mapping={rid_of(0): "right", f"group:{rid_of(0)}": "split"})
    desk.restart()
    assert desk.run.client.hgetall(desk.run.key("rewards")) == {}


def test_an_ended_run_that_is_resumed_knows_the_half_of_a_group_that_was_booked(begin: Callable[..., Desk]) -> None:
    desk = begin(feeder={"concurrency": 3})
    desk.go_on()
    desk.take()
    for number in range(3):
        verdict(desk, number)
        desk.settle(rid_of(number))
    desk.finish_run()
    desk.feeder.finish()
    assert desk.run.client.exists(desk.run.key("rewards")) == 0
    desk.run.plane.reopen(desk.run.config.to_yaml())
    desk.restart()
    assert standings(desk)[2] == "right", "number 3 will be admitted, and its group has one who was rewarded"


def test_without_reward_mode_nothing_is_stored(begin: Callable[..., Desk]) -> None:
    desk = begin(reward={"mode": "none"})
    desk.go_on()
    desk.take()
    verdict(desk, 0)
    desk.settle(rid_of(0))
    desk.go_on()
    assert desk.run.client.exists(desk.run.key("rewards")) == 0
    assert "reward" not in desk.lines()[rid_of(0)]


# --- several data servers ---


class Spread(Scene):
    """As Scene, with groups of three."""

    def __init__(self, servers: list[EmbeddedRedis], folder: Path) -> None:
        self.clients = [connect(server.url) for server in servers]
        self.config: Config = make_config(
            folder,
            redis={"data": [server.url for server in servers]},
            learner={"batch_size": 6, "max_staleness": 4},
            data={"num_generations": 3},
            reward={"mode": "grpo"},
            feeder={"concurrency": 12},
            termination={"policy": "none"},
        )
        create_on(self.clients, self.config, "spread")
        self.planes = self.plane()
        self.now = 0.0
        self.feeder = self.begin()

    def stored(self) -> dict[str, str | None]:
        rids = [rid_of(number) for number in range(12)]
        return {rid: one.standing for rid, one in zip(rids, self.planes.rewarded(rids), strict=True)}


@pytest.fixture
def spread(three_servers: list[EmbeddedRedis], tmp_path: Path) -> Iterator[Spread]:
    scene = Spread(three_servers, tmp_path / "runs")
    yield scene
    scene.feeder.books.close()


def test_each_standing_is_on_its_rollouts_server_and_what_a_lost_one_had_is_made_up_for(spread: Spread) -> None:
    spread.go_on()
    rids = [rid_of(number) for number in range(12)]
    for rid in rids[:3]:
        spread.feeder._lease.call(scripts.reward(rid, "right"))
    for part in spread.planes.parts:
        own = {name.decode() for name in part.client.hkeys(part.key("rewards"))}
        assert own == {rid for rid in rids[:3] if part is spread.planes.parts[spread.planes.place_of(rid)]}
    learner = Lease(spread.planes, "learner", 600.0)
    for place in spread.planes.places:
        assert spread.planes.call(learner._call("take", place)) is scripts.Leased.OK
    assert learner.call(scripts.forgo(rids[3], "split")) == "split"
    assert learner.call(scripts.forgo(rids[3], "late")) == "split"
    assert spread.planes.rewarded([rids[3]])[0].forgone == "split"
    spread.feeder.step(block_s=0.001)
    spread.clients[1].flushdb()
    with pytest.raises(RunGone):
        spread.go_on()
        spread.feeder.step(block_s=0.001)
        spread.feeder._lease._renew()
    spread.kill()
    create_on(spread.clients, spread.config, "spread")
    spread.feeder = spread.begin()
    lost = {rid for rid in rids if spread.planes.place_of(rid) == 1}
    open_groups = {number_of(rid) // 3 for rid in rids if rid not in lost}
    stored = spread.stored()
    assert {rid for rid in lost if number_of(rid) // 3 in open_groups} == {
        rid for rid, standing in stored.items() if standing == "lost"
    }, "the learner, which waits for a group of which others are left, is told"
