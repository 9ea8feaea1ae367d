"""Commands on a run of three data servers: each finds what is on any of them, and names the server that is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import make_config, make_head

from common.config import Config, ConfigError, parse
from common.rids import rid_of
from common.runfiles.making import open_folder
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.plane import Plane
from common.wire.planes import create_on, open_planes
from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis
from ops.run import failures, roles
from ops.run.health import _redis_trouble

RIDS = [rid_of(number) for number in range(12)]


class Spread:
    """A run with twelve admitted rollouts and its folder."""

    def __init__(self, servers: list[EmbeddedRedis], folder: Path) -> None:
        self.servers = servers
        broker = servers[0].broker_url
        redis = {"data": [server.url for server in servers], "broker_url": broker}
        self.config: Config = make_config(folder, name="spread", redis=redis, liveness={"redis_wait_s": 1.0})
        run_key = open_folder(self.config, resume=False)
        clients = [connect(server.url) for server in servers]
        create_on(clients, self.config, run_key)
        self.plane: Plane = open_planes(self.config, clients, run_key)
        self.plane.client.hset("katana:runs", "spread", run_key)
        self.feeder = Lease(self.plane, "feeder", 600.0)
        self.feeder.acquire(threading.Event())
        behind = [0] * 3
        for rid in RIDS:
            behind[self.plane.place_of(rid)] += 1
            self.feeder.call(scripts.admit(rid, make_head(rid).encode(), behind[self.plane.place_of(rid)]))

    @property
    def path(self) -> str:
        return str(self.config.run_dir)


@pytest.fixture
def spread(three_servers: list[EmbeddedRedis], tmp_path: Path) -> Spread:
    return Spread(three_servers, tmp_path / "runs")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    found = main(list(arguments))
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out + captured.err


def test_top_adds_up_all_servers(spread: Spread, capsys: pytest.CaptureFixture[str]) -> None:
    seen = json.loads(said(capsys, "top", spread.path, "--once", "--json"))
    assert seen["redis"] == ""
    assert (seen["open_rollouts"], seen["ledger"]["admitted"]) == (12, 12)
    assert seen["streams"]["prompts"]["outstanding"] == 12
    assert [role["lease"] for role in seen["roles"][:3]] == [True, False, False]
    last = spread.plane.parts[2]
    last.client.delete(last.key("lease:feeder"))
    seen = json.loads(said(capsys, "top", spread.path, "--once", "--json"))
    assert seen["roles"][0]["lease"] is False, "whoever lacks one of them does not act"


def test_top_says_so_when_one_of_them_is_away(spread: Spread, capsys: pytest.CaptureFixture[str]) -> None:
    spread.servers[1].stop()
    assert "does not answer" in json.loads(said(capsys, "top", spread.path, "--once", "--json"))["redis"]


def test_watch_finds_a_rollout_on_its_server(spread: Spread, capsys: pytest.CaptureFixture[str]) -> None:
    for rid in RIDS:
        assert rid in said(capsys, "watch", spread.path, rid)
    assert "admitted are r000000000 … r000000011" in said(capsys, "watch", spread.path, "77", code=2)


def test_dead_letters_are_listed_shown_and_sent_back(spread: Spread, capsys: pytest.CaptureFixture[str]) -> None:
    victims = [next(rid for rid in RIDS if spread.plane.place_of(rid) == place) for place in range(3)]
    for rid in victims:
        assert spread.plane.fail(rid, "rollout", "poison", max_attempts=1)
        assert spread.feeder.call(scripts.book(rid, "dead", []))
    letters = [json.loads(line) for line in said(capsys, "dead", spread.path, "--json").splitlines()]
    assert {letter["rid"] for letter in letters} == set(victims)
    assert all(letter["record"] == "there" for letter in letters)
    for letter in letters:
        assert letter["rid"] in said(capsys, "dead", spread.path, "--show", letter["entry"])
        assert "is sent back" in said(capsys, "dead", spread.path, "--again", letter["entry"])
    assert "3 sent back, waiting" in said(capsys, "dead", spread.path)
    assert [len(one) for one in spread.plane.requests_by_server(9)] == [1, 1, 1]


def test_clean_removes_the_keys_of_all(spread: Spread, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is running; stop them first" in said(capsys, "clean", spread.path, code=2)
    spread.feeder.drop()
    said_so = said(capsys, "clean", spread.path)
    assert all(server.url in said_so for server in spread.servers)
    assert [list(part.client.scan_iter("katana:{*")) for part in spread.plane.parts] == [[], [], []]
    assert not spread.config.run_dir.exists()


def test_check_names_the_server_that_is_wrong(
    spread: Spread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    demo = str(Path(__file__).parents[3] / "ops" / "experiments" / "demo.yaml")
    first, second, third = (server.url for server in spread.servers)
    same = f"{second}&client_name=other"

    def check(urls: list[str], code: int) -> str:
        hurried = ("--set", "liveness.redis_wait_s=0.3")
        return said(capsys, "check", demo, "--set", f"redis.data={json.dumps(urls)}", *hurried, code=code)

    assert "on 3 data servers" in check([first, second, third], 0)
    spread.servers[2].stop()
    assert f"redis.data[2] {third!r}: Redis does not answer" in check([first, second, third], 0)
    assert "redis.data: allowed" in check([first, same], 2)
    again = second.replace("?db=0", "?db=00")
    assert f"{second} and {again} are the same database of one server" in check([first, second, again], 2)
    spread.plane.parts[1].client.config_set("maxmemory-policy", "allkeys-lru")
    assert f"{second}: maxmemory-policy is allkeys-lru" in check([first, second], 2)


def test_a_role_with_the_servers_in_another_order_does_not_join(spread: Spread) -> None:
    urls = [server.url for server in spread.servers]
    swapped = [urls[0], urls[2], urls[1]]
    redis = spread.config.redis.model_copy(update={"data": swapped})
    config = spread.config.model_copy(update={"redis": redis})
    with pytest.raises(ConfigError, match="is server 2 of 3 of the list and has the part of server 3 of 3"):
        roles._join("arbiter", config, [connect(url) for url in swapped], threading.Event())
    joined, plane = roles._join("arbiter", spread.config, [connect(url) for url in urls], threading.Event())
    assert (joined.name, len(plane.parts)) == ("spread", 3)


def test_the_feeder_opens_the_run_again_where_it_was_lost(spread: Spread) -> None:
    clients = [connect(server.url) for server in spread.servers]
    lost: Any = clients[2]
    lost.flushdb()
    _, plane = roles._join("feeder", spread.config, clients, threading.Event())
    assert [part.state() for part in plane.parts] == ["open"] * 3
    assert [part.place() for part in plane.parts] == ["0/3", "1/3", "2/3"]
    assert plane.cursors()[2] == 0 < min(plane.cursors()[:2])


def test_a_role_waits_for_a_server_that_lost_the_run(spread: Spread) -> None:
    clients = [connect(server.url) for server in spread.servers]
    clients[1].flushdb()
    with pytest.raises(Exception, match="does not know the run"):
        roles._join("arbiter", spread.config, clients, threading.Event())


def test_a_health_check_looks_at_every_server(spread: Spread) -> None:
    assert _redis_trouble("arbiter", spread.config) == []
    spread.servers[1].stop()
    [trouble] = _redis_trouble("arbiter", spread.config)
    assert trouble.startswith("redis.data[1] ")


@pytest.mark.parametrize("role", ["rollout", "teacher", "arbiter", "feeder"])
def test_progress_on_any_server_is_progress(spread: Spread, role: str) -> None:
    last = spread.plane.parts[2]
    before = failures.mark_of(role, spread.plane, spread.config.run_dir)
    change: dict[str, Callable[[], Any]] = {
        "rollout": lambda: last.client.hincrby(last.key("policy"), "generated", 1),
        "teacher": lambda: last.client.xadd(last.key("scores"), {"rid": "r"}),
        "arbiter": lambda: last.client.xadd(last.key("trajectories"), {"rid": "r"}),
        "feeder": lambda: last.client.hincrby(last.key("ledger"), "trained", 1),
    }
    assert failures.mark_of(role, spread.plane, spread.config.run_dir) == before
    change[role]()
    assert failures.mark_of(role, spread.plane, spread.config.run_dir) != before


def test_addresses_may_change_and_the_number_may_not(spread: Spread) -> None:
    moved = parse(spread.config.to_yaml(), ["redis.data=['redis://a', 'redis://b', 'redis://c']"])
    assert open_folder(moved, resume=True) == spread.plane.run_key
    fewer = parse(spread.config.to_yaml(), ["redis.data=['redis://a', 'redis://b']"])
    with pytest.raises(ConfigError, match="begun on 3 data servers and cannot go on with 2: each has a part"):
        open_folder(fewer, resume=True)
