"""Several data servers as one plane: each rollout is whole on its own, whatever is counted once is at the home."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from samples import make_config, make_head, make_logprobs, make_support, make_tokens, make_verdict

from common.config import Config, ConfigError, parse
from common.rids import rid_of
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease, LeaseLost
from common.wire.plane import Plane, Roster, RunGone
from common.wire.planes import check_places, create_on, open_planes
from common.wire.scripts import Ending, Ownership, Written
from ops.reach.embedded import EmbeddedRedis

RIDS = [rid_of(number) for number in range(24)]


def config_on(folder: Path, servers: list[EmbeddedRedis], **sections: Any) -> Config:
    return make_config(folder, redis={"data": [server.url for server in servers]}, **sections)


@pytest.fixture
def planes(three_servers: list[EmbeddedRedis], tmp_path: Path) -> Plane:
    config = config_on(tmp_path, three_servers)
    clients = [connect(server.url) for server in three_servers]
    create_on(clients, config, "spread")
    return open_planes(config, clients, "spread")


def lease(plane: Plane, role: str) -> Lease:
    held = Lease(plane, role, 600.0)
    held.acquire(threading.Event())
    return held


def admit(plane: Plane, feeder: Lease, rids: list[str] = RIDS) -> None:
    behind = [0] * len(plane.parts)
    calls = []
    for rid in rids:
        behind[plane.place_of(rid)] += 1
        calls.append(scripts.admit(rid, make_head(rid).encode(), behind[plane.place_of(rid)]))
    assert set(feeder.call_all(calls)) == {scripts.Admitted.OK}


def take(plane: Plane, consumer: str = "w1", nonce: str = "n1") -> dict[str, bytes]:
    """Rollout → entry."""
    given = plane.call_all([scripts.take(consumer, nonce, 100, 0, b"0-0", place) for place in plane.places])
    return {bytes(offer.rid or b"").decode(): offer.entry for one in given for offer in one.offers}


def test_a_single_server_is_a_plain_plane_and_stores_nothing_else(
    embedded_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    client: Any = connect(embedded_redis.url)
    config = make_config(tmp_path, redis={"url": embedded_redis.url})
    create_on([client], config, "alone")
    plane = open_planes(config, [client], "alone")
    assert type(plane) is Plane
    assert plane.parts == (plane,)
    check_places(config, plane)
    assert not client.exists(plane.key("place"))


def test_a_rollout_goes_its_whole_way_on_its_own_server(planes: Plane) -> None:
    feeder, arbiter, learner = (lease(planes, role) for role in ("feeder", "arbiter", "learner"))
    admit(planes, feeder)
    places = {rid: planes.place_of(rid) for rid in RIDS}
    assert set(places.values()) == {0, 1, 2}
    assert planes.open_rollouts() == RIDS
    taken = take(planes)
    assert set(taken) == set(RIDS)
    chunks = []
    for rid in RIDS:
        record, support, student = make_tokens(finish="eos"), make_support(3), make_logprobs(3)
        encoded = record.encode(), support.encode(), student.encode()
        chunks.append(scripts.chunk(rid, "n1", 0, *encoded, planes.shard_of(rid), 3, "eos"))
    assert {one.word for one in planes.call_all(chunks)} == {scripts.ChunkAnswer.OK}
    assert planes.generated() == 3 * len(RIDS)

    shards = [f"chunks:{shard}" for shard in range(planes.shards)]
    notices = []
    while came := planes.read("teacher", "t1", shards, count=100, block_s=0.0):
        notices += came
    assert len({(stream, entry) for stream, (entry, _) in notices}) == len(RIDS), "no two servers name an entry alike"
    scores = [
        scripts.score(int(stream.partition(":")[2]), entry, values[b"rid"].decode(), 0, b"d", b"q")
        for stream, (entry, values) in notices
    ]
    assert set(planes.call_all(scores)) == {scripts.ScoreAnswer.OK}
    assert planes.backlog().streams["scores"][0] == len(RIDS)

    scored = arbiter.adopt("scores", "arbiter")
    while came := planes.read("arbiter", arbiter.token, ["scores"], count=100, block_s=0.0):
        scored += [entry for _, entry in came]
    for entry, values in scored:
        rid = values[b"rid"].decode()
        call = scripts.verdict(rid, make_verdict(rid).encode(), 2, False, None, 4, "", [entry])
        assert arbiter.call(call) is scripts.Judged.OK
    trajectories = []
    while came := planes.read("learner", learner.token, ["trajectories"], count=100, block_s=0.0):
        trajectories += [(entry, values[b"rid"].decode()) for _, (entry, values) in came]
    assert {rid for _, rid in trajectories} == set(RIDS)
    for some in planes.by_server([Ending(*one, "trained") for one in trajectories], lambda one: one.rid):
        assert learner.call(scripts.settle(some)) == len(some)
    assert all(b"settled" in record for record in planes.rollouts(RIDS))

    finished: dict[str, list[bytes]] = {}
    while came := planes.read("books", feeder.token, ["finished"], count=100, block_s=0.0):
        for _, (entry, values) in came:
            finished.setdefault(values[b"rid"].decode(), []).append(entry)
    assert all(feeder.call_all([scripts.book(rid, "trained", entries) for rid, entries in finished.items()]))
    assert planes.ledger() == {"admitted": len(RIDS), "trained": len(RIDS)}
    assert planes.open_rollouts() == []
    for stream, _ in planes.groups:
        assert all(part.client.xlen(part.key(stream)) == 0 for part in planes.parts), stream
    by_server = [part.ledger()["trained"] for part in planes.parts]
    assert by_server == [list(places.values()).count(place) for place in range(3)]


def test_what_is_asked_of_several_rollouts_comes_in_their_order(planes: Plane) -> None:
    admit(planes, lease(planes, "feeder"))
    rids = RIDS[::-1]
    heads = planes.fields((rid, ["head"]) for rid in rids)
    assert [head for (head,) in heads] == [make_head(rid).encode() for rid in rids]
    assert [record[b"head"] for record in planes.rollouts(rids)] == [make_head(rid).encode() for rid in rids]
    assert all(state.open and state.there for state in planes.record_states(rids))


def test_a_beat_asks_each_server_about_its_own_and_releases_go_back_where_they_are(planes: Plane) -> None:
    admit(planes, lease(planes, "feeder"))
    taken = take(planes)
    written = [Written(rid, taken[rid], "n1") for rid in RIDS]
    groups = planes.by_server(written, lambda one: one.rid)
    calls = [scripts.beat("w1", b"0-0", [], some, planes.place_of(some[0].rid)) for some in groups]
    standings = [standing for beat in planes.call_all(calls) for standing in beat.standings]
    assert [one.ownership for one in standings] == [Ownership.OURS] * len(RIDS)
    planes.call_all([scripts.release("w1", some) for some in groups])
    given = planes.call_all([scripts.take("w2", "n2", 100, 1000, b"0-0", place) for place in planes.places])
    assert {bytes(offer.rid or b"").decode() for one in given for offer in one.offers} == set(RIDS)


# --- who is alive, and who may act ---


def test_a_heartbeat_reaches_all_servers_and_the_end_too(planes: Plane) -> None:
    roster = Roster(silence_s=10.0)
    planes.seen("t1", role="teacher", roster=roster, busy="0.5")
    assert roster.names == ["t1"]
    assert [list(part.live(10.0)) for part in planes.parts] == [["t1"]] * 3
    planes.gone("t1", role="teacher", streams=["chunks:0"])
    assert [list(part.live(10.0)) for part in planes.parts] == [[]] * 3


def test_whoever_lacks_the_lease_of_one_server_has_lost_the_role(planes: Plane) -> None:
    first, second = (Lease(planes, "learner", 0.5) for _ in range(2))
    first.acquire(threading.Event())
    with pytest.raises(LeaseLost, match="another learner is at work"):
        second.acquire(threading.Event(), wait_s=-1.0)
    first.advance("step", 3)
    # Another one has it on the last server alone.
    last = planes.parts[2]
    last.client.set(last.key("lease:learner"), second.token)
    last.client.set(last.key("holder:learner"), second.token)
    time.sleep(0.2)  # until it is renewed
    with pytest.raises(LeaseLost, match="another learner took over"):
        first.keep()
    with pytest.raises(LeaseLost):
        first.advance("state", "trained")
    first.drop()
    assert last.client.get(last.key("lease:learner")) == second.token.encode(), "it is not ours to drop"
    assert not planes.client.exists(planes.key("lease:learner"))


def test_a_role_waits_until_it_has_the_lease_of_every_server(planes: Plane) -> None:
    last = planes.parts[2]
    assert last.call(scripts.lease("arbiter", "former", 700, "take")) is scripts.Leased.OK
    began = time.monotonic()
    lease(planes, "arbiter")
    assert time.monotonic() - began > 0.3
    assert last.client.get(last.key("lease:arbiter")) != b"former"


def test_the_run_ends_at_the_home_last(planes: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder = lease(planes, "feeder")
    seen = []
    for place, part in enumerate(planes.parts):
        evaluate = part._evaluate
        monkeypatch.setattr(
            part, "_evaluate", lambda calls, place=place, evaluate=evaluate: (seen.append(place), evaluate(calls))[1]
        )
    feeder.advance("state", "ended")
    assert seen == [2, 1, 0]
    assert [part.state() for part in planes.parts] == ["ended"] * 3
    planes.reopen("name: other")
    assert [(part.state(), part.config()) for part in planes.parts] == [("open", b"name: other")] * 3


# --- reading ---


def test_a_read_that_waits_finds_what_comes_to_any_server(planes: Plane) -> None:
    for place in (2, 1, 0, 1, 2):
        part = planes.parts[place]
        later = threading.Timer(0.05, part.client.xadd, (part.key("scores"), {"rid": f"at-{place}"}))
        later.start()
        [(stream, (entry, values))] = planes.read("arbiter", "a", ["scores"], count=10, block_s=2.0)
        later.join()
        assert (stream, values) == ("scores", {b"rid": f"at-{place}".encode()})
        assert entry.endswith(f"@{place}".encode()) == (place > 0)
    assert planes.read("arbiter", "a", ["scores"], count=10, block_s=0.05) == []


def test_no_server_is_read_to_the_neglect_of_others(planes: Plane) -> None:
    for part in planes.parts:
        for number in range(10):
            part.client.xadd(part.key("scores"), {"rid": f"r{number}"})
    sources = [planes.read("arbiter", "a", ["scores"], count=10, block_s=0.0) for _ in range(3)]
    assert [len(some) for some in sources] == [10, 10, 10]
    assert len({entry.partition(b"@")[2] for some in sources for _, (entry, _) in some}) == 3


def test_letters_of_all_servers_come_by_age_a_page_at_a_time(planes: Plane) -> None:
    for number in range(4):
        for part in planes.parts:
            part.client.xadd(part.key("dead"), {"rid": "", "stage": "s"}, id=f"{100 + number}-0")
    whole = [entry for entry, _ in planes.dead_letters("-", "+", 100)]
    assert len(set(whole)) == 12
    pages, begin = [], "-"
    while found := planes.dead_letters(begin, "+", 5):
        pages += [entry for entry, _ in found]
        begin = "(" + found[-1][0].decode()
    assert pages == whole
    [(one, _)] = planes.dead_letters("101-0@2", "101-0@2", 1)
    assert one == b"101-0@2"
    assert planes.send_back("101-0@2", "", None) is scripts.SentBack.OK
    assert planes.dead_letters("101-0@2", "101-0@2", 1) == []
    assert planes.dead_letters("101-0", "101-0", 1) != []
    assert planes.dead_letters("101-0@7", "101-0@7", 1) == []


# --- memory ---


def test_memory_is_that_of_the_fullest_server_for_all(planes: Plane) -> None:
    full = planes.parts[1]
    full.client.set("filler", b"x" * (8 << 20))
    seen = planes.memory()
    assert seen["maxmemory"] == 3 * full.memory()["maxmemory"]
    assert seen["used_memory"] > 3 * (8 << 20)
    backlog = planes.backlog().memory
    assert backlog is not None and backlog["used_memory"] > 3 * (8 << 20)


# --- which servers ---


def test_servers_in_another_order_or_number_are_refused(
    three_servers: list[EmbeddedRedis], planes: Plane, tmp_path: Path
) -> None:
    a, b, c = three_servers
    for others in ([b, a, c], [a, b], [a], [c]):
        config = config_on(tmp_path, others)
        clients = [connect(server.url) for server in others]
        with pytest.raises(ConfigError, match=r"redis\.data: unix.* is server 1 of . of the list and has the part of"):
            create_on(clients, config, "spread")
    assert [part.client.get(part.key("place")) for part in planes.parts] == [b"0/3", b"1/3", b"2/3"]


def test_a_run_of_one_server_does_not_go_on_with_three(three_servers: list[EmbeddedRedis], tmp_path: Path) -> None:
    alone = config_on(tmp_path, three_servers[:1])
    create_on([connect(three_servers[0].url)], alone, "alone")
    with pytest.raises(
        ConfigError, match=r"is server 1 of 3 of the list and has the part of server 1 of 1 of run alone"
    ):
        create_on([connect(server.url) for server in three_servers], config_on(tmp_path, three_servers), "alone")


def test_a_server_that_lost_its_data_is_named(planes: Plane, three_servers: list[EmbeddedRedis]) -> None:
    lost = planes.parts[1]
    lost.client.flushdb()
    with pytest.raises(RunGone) as gone:
        planes.call_all([scripts.attempt(rid, "teacher", "begin") for rid in RIDS])
    assert three_servers[1].url in str(gone.value)


@pytest.mark.parametrize(
    ("given", "url", "data"),
    [
        ("{url: 'redis://a'}", "redis://a", []),
        ("{data: 'redis://a'}", "redis://a", []),
        ("{data: ['redis://a']}", "redis://a", []),
        ("{data: ['redis://a', 'redis://b']}", "redis://a", ["redis://a", "redis://b"]),
        ("{url: 'redis://a', data: ['redis://a', 'redis://b']}", "redis://a", ["redis://a", "redis://b"]),
    ],
)
def test_a_list_of_one_is_a_single_server(given: str, url: str, data: list[str]) -> None:
    config = parse(f"{{student: {{model: s}}, teacher: {{model: t}}, redis: {given}}}")
    assert (config.redis.url, config.redis.data) == (url, data)
    assert config.redis.servers == (tuple(data) or (url,))
    assert parse(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("redis: {url: 'redis://b', data: ['redis://a', 'redis://b']}", "url and data name different servers"),
        ("redis: {data: ['redis://a', 'redis://a']}", "a server is named twice"),
        ("redis: {data: ['redis://a', 'http://b']}", "redis.data: allowed: redis://HOST:PORT/DB"),
        ("redis: {data: ['http://a', 'redis://b']}", "redis.data: allowed: redis://HOST:PORT/DB"),
        ("redis: {data: a}", "redis.data: allowed: redis://HOST:PORT/DB"),
        ("redis: {data: ['redis://a', 'redis://:secret@b']}", "user and password do not belong in a URL"),
        ("deterministic: true\nredis: {data: ['redis://a', 'redis://b']}", "with deterministic only one is allowed"),
    ],
)
def test_a_wrong_list_is_refused_in_one_sentence(given: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        parse(f"student: {{model: s}}\nteacher: {{model: t}}\n{given}")
