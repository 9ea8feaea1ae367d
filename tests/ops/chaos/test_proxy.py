"""The proxy passes everything on as it is; each of its faults does what it says, and nothing else, to one process."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from common.wire.connect import connect
from ops.chaos.proxy import Frames, RedisProxy, arguments, request, unblocked
from ops.reach.embedded import EmbeddedRedis

pytestmark = pytest.mark.slow

ME = os.getpid()
ADD = "redis.call('RPUSH', KEYS[1], ARGV[1]); return {ARGV[1], redis.call('LLEN', KEYS[1])}"

REPLIES = [
    b"+OK\r\n",
    b"-ERR no such thing\r\n",
    b":-12\r\n",
    b"$0\r\n\r\n",
    b"$-1\r\n",
    b"$12\r\n*2\r\n$1\r\nab\r\n\r\n",
    b"*0\r\n",
    b"*-1\r\n",
    b"*2\r\n$2\r\nok\r\n*3\r\n:1\r\n$-1\r\n*1\r\n+x\r\n",
    b"_\r\n",
    b"#t\r\n",
    b",1.5\r\n",
    b"(123456789012345678901234567890\r\n",
    b"!5\r\nERR x\r\n",
    b"=7\r\ntxt:abc\r\n",
    b"%2\r\n+a\r\n:1\r\n$1\r\nb\r\n*2\r\n:1\r\n:2\r\n",
    b"~2\r\n+a\r\n+b\r\n",
    b">2\r\n$7\r\nmessage\r\n$1\r\nx\r\n",
    b"|1\r\n+ttl\r\n:3\r\n*1\r\n:7\r\n",
]


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_frames_are_found_however_the_stream_is_cut(step: int) -> None:
    stream = b"".join(REPLIES)
    frames, found = Frames(), []
    for at in range(0, len(stream), step):
        found += [bytes(frame) for frame in frames.feed(stream[at : at + step])]
    assert found == REPLIES
    assert not frames.partial


def test_frames_are_found_when_cut_at_any_one_byte() -> None:
    stream = b"".join(REPLIES)
    for at in range(len(stream) + 1):
        frames = Frames()
        first = frames.feed(stream[:at])
        assert frames.partial == (b"".join(first) != stream[:at])
        assert [bytes(frame) for frame in [*first, *frames.feed(stream[at:])]] == REPLIES


@pytest.mark.parametrize(
    "text", [b"PING\r\n", b"\r\n", b"$3\r\nabcd\r\n", b"$?\r\n", b"*x\r\n", b"*1\r\n$1\r\nabc\r\n", b"+" + b"x" * 70000]
)
def test_what_is_not_resp_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        Frames().feed(text + b"+OK")


def test_a_request_is_read_and_written() -> None:
    words = [b"XADD", b"", b"\r\n$3\r\n", bytes(range(256)), b"x" * 100_000]
    assert arguments(request(words)) == words
    with pytest.raises(ValueError):
        arguments(b"+OK\r\n")
    with pytest.raises(ValueError):
        arguments(b"*1\r\n:1\r\n")


def test_a_read_is_copied_without_its_block() -> None:
    head = [b"XREADGROUP", b"GROUP", b"block", b"block"]
    streams = [b"STREAMS", b"block", b"other", b">", b">"]
    blocking = request([*head, b"COUNT", b"5", b"block", b"2000", *streams])
    assert unblocked(blocking) == request([*head, b"COUNT", b"5", *streams])
    assert unblocked(request([*head, *streams])) == request([*head, *streams])
    assert unblocked(request([*head, b"STREAMS", b"block", b"0-0"])) is None


# --- on a real Redis -------------------------------------------------------------------------------------------------


class Rig:
    """A proxy before a server, and clients on either side of it."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="katana-"))  # a test's own folder may be too deep for a socket
        upstream = Path(server.url.removeprefix("unix://").partition("?")[0])
        self.socket = self.folder / "p.sock"
        self.proxy = RedisProxy(self.socket, upstream, random.Random(7))
        self.proxy.start()
        self.clients: list[redis.Redis] = []
        self.direct: Any = connect(server.url)
        self.key = f"test:{self.folder.name}"

    def client(self, database: int = 0) -> Any:
        self.clients.append(connect(f"unix://{self.socket}?db={database}"))
        return self.clients[-1]

    def close(self) -> None:
        for client in [*self.clients, self.direct]:
            client.close()
        self.proxy.close()
        shutil.rmtree(self.folder)


@pytest.fixture
def rig(any_redis: EmbeddedRedis) -> Iterator[Rig]:
    rig = Rig(any_redis)
    yield rig
    rig.direct.delete(rig.key, f"{rig.key}:2")
    rig.close()


def eventually(holds: Callable[[], object], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


@pytest.mark.parametrize("protocol", [2, 3])
def test_values_pipelines_and_errors_pass_unchanged(rig: Rig, protocol: int) -> None:
    client: Any = redis.Redis.from_url(f"unix://{rig.socket}?db=0&protocol={protocol}")
    rig.clients.append(client)
    value = random.Random(0).randbytes(1_000_000)
    client.set(rig.key, value)
    assert client.get(rig.key) == value == rig.direct.get(rig.key)
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        client.lpush(rig.key, "x")
    client.delete(rig.key)
    pipe = client.pipeline(transaction=False)
    for index in range(500):
        pipe.hset(rig.key, f"field{index}", b"v" * index)
        pipe.hget(rig.key, f"field{index}")
    assert pipe.execute()[1::2] == [b"v" * index for index in range(500)]
    assert client.hgetall(rig.key) == {b"field%d" % index: b"v" * index for index in range(500)}
    with client.pipeline(transaction=True) as block:
        assert block.hlen(rig.key).delete(rig.key).execute() == [500, 1]
    assert rig.socket.stat().st_mode & 0o777 == 0o700


def test_a_blocking_read_is_answered_when_something_comes(rig: Rig) -> None:
    client, found = rig.client(), []
    client.xgroup_create(rig.key, "group", id="0", mkstream=True)

    def read() -> None:
        found.append(client.xreadgroup("group", "me", {rig.key: ">"}, block=5000))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    assert not found
    rig.client().xadd(rig.key, {"a": b"x" * 300_000})
    reader.join(2)
    assert found and found[0]


def test_messages_of_a_channel_pass(rig: Rig) -> None:
    listener = rig.client().pubsub()
    listener.subscribe(rig.key)
    assert listener.get_message(timeout=2.0)["type"] == "subscribe"
    for text in (b"one", b"two"):
        rig.client().publish(rig.key, text)
        assert listener.get_message(timeout=2.0)["data"] == text
    listener.unsubscribe()
    assert listener.get_message(timeout=2.0)["type"] == "unsubscribe"
    listener.close()


def test_duplicate_sends_each_script_twice_and_shows_one_answer(rig: Rig) -> None:
    client = rig.client()
    add = client.register_script(ADD)
    assert add([rig.key], ["first"]) == [b"first", 1]
    hits = rig.proxy.duplicate(ME, 60.0)
    for index in range(20):
        word, length = add([rig.key], [index])
        assert word == b"%d" % index
        assert length in (2 * index + 2, 2 * index + 3)  # of the first or of the second
    pipe = client.pipeline(transaction=False)
    for word in (b"x", b"y"):
        pipe.evalsha(add.sha, 1, rig.key, word)
        pipe.rpush(f"{rig.key}:2", word)  # no script: sent once
    assert [answer[0] for answer in pipe.execute()[::2]] == [b"x", b"y"]
    eventually(lambda: hits.duplicated == 22)
    assert rig.direct.lrange(rig.key, 0, -1) == [b"first", *(b"%d" % (n // 2) for n in range(40)), *b"x x y y".split()]
    assert rig.direct.lrange(f"{rig.key}:2", 0, -1) == [b"x", b"y"]
    rig.proxy.clear(ME)
    add([rig.key], ["last"])
    assert rig.direct.llen(rig.key) == 46
    assert hits.duplicated == 22


def test_a_script_that_redis_does_not_know_is_no_hit(rig: Rig) -> None:
    hits = rig.proxy.duplicate(ME, 60.0)
    with pytest.raises(redis.exceptions.NoScriptError):
        rig.client().evalsha("0" * 40, 1, rig.key)
    time.sleep(0.05)
    assert hits.duplicated == 0


def test_transactions_and_the_broker_are_left_alone(rig: Rig) -> None:
    broker, client = rig.client(database=1), rig.client()
    duplicated, swapped = rig.proxy.duplicate(ME, 60.0), rig.proxy.swap(ME, 60.0)
    for one in (broker, client):
        with one.pipeline(transaction=True) as block:
            answers = block.eval(ADD, 1, rig.key, "a").eval(ADD, 1, rig.key, "b").execute()
        assert answers == [[b"a", 1], [b"b", 2]]
    assert broker.eval(ADD, 1, rig.key, "c") == [b"c", 3]
    time.sleep(2.2)  # late copies would have come
    assert [one.llen(rig.key) for one in (broker, client)] == [3, 2]
    broker.delete(rig.key)
    assert (duplicated.duplicated, swapped.swapped, swapped.replayed) == (0, 0, 0)


def test_swap_reverses_a_pipeline_and_answers_in_its_order(rig: Rig) -> None:
    client = rig.client()
    hits = rig.proxy.swap(ME, 60.0)
    pipe = client.pipeline(transaction=False)
    for index in range(10):
        pipe.eval(ADD, 1, rig.key, b"%d" % index + b"x" * 30_000 * index)  # sent piece by piece
    answers = pipe.execute()
    assert [answer[0][:1] for answer in answers] == [b"%d" % index for index in range(10)]
    assert [len(answer[0]) for answer in answers] == [1 + 30_000 * index for index in range(10)]
    assert sorted(answer[1] for answer in answers) == list(range(1, 11))
    assert answers[-1][1] < answers[0][1]
    assert hits.swapped == 10


def test_swap_sends_a_single_script_again_after_others_have_passed(rig: Rig) -> None:
    client = rig.client()
    rig.direct.rpush(rig.key, "before")
    hits = rig.proxy.swap(ME, 60.0)
    assert client.eval(ADD, 1, rig.key, "late") == [b"late", 2]
    client.rpush(rig.key, "between")
    eventually(lambda: rig.direct.llen(rig.key) == 4)
    assert rig.direct.lrange(rig.key, 0, -1) == [b"before", b"late", b"between", b"late"]
    eventually(lambda: hits.replayed == 1)
    time.sleep(0.1)
    assert rig.direct.llen(rig.key) == 4


def test_a_late_copy_is_let_in_where_redis_asks_for_a_password(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis", maxmemory_mb=32)
    server.start()
    connect(server.url).config_set("requirepass", "secret")
    rig = Rig(server)
    password = tmp_path / "password"
    password.write_text("secret\n")
    client: Any = connect(f"unix://{rig.socket}?db=0", password_file=str(password))
    try:
        hits = rig.proxy.swap(ME, 60.0)
        client.eval(ADD, 1, rig.key, "late")
        eventually(lambda: hits.replayed == 1)
        assert client.llen(rig.key) == 2
    finally:
        client.close()
        rig.close()
        server.stop()


@pytest.mark.parametrize("reads", [False, True])
def test_a_copied_read_leaves_entries_that_nobody_saw(rig: Rig, reads: bool) -> None:
    client = rig.client()
    client.xgroup_create(rig.key, "group", id="0", mkstream=True)
    for index in range(40):
        client.xadd(rig.key, {"n": index})
    hits = rig.proxy.duplicate(ME, 60.0, reads=reads)
    seen = []
    while answer := client.xreadgroup("group", "me", {rig.key: ">"}, count=4, block=50):
        ((_, entries),) = answer.items() if isinstance(answer, dict) else answer
        seen += entries[0] if isinstance(entries[0], list) else entries
    pending = client.xpending(rig.key, "group")["pending"]
    assert pending == 40
    assert len(seen) == (40 if not reads else 20)
    assert (hits.duplicated > 0) == reads


def test_delay_holds_back_each_request(rig: Rig) -> None:
    client = rig.client()
    client.ping()
    hits = rig.proxy.delay(ME, 0.05, for_s=60.0)
    began = time.monotonic()
    for _ in range(10):
        client.ping()
    assert 10 * 0.025 <= time.monotonic() - began < 10 * 0.075 + 1
    assert hits.delayed == 10
    rig.proxy.delay(ME, 10.0, for_s=0.0)  # over as soon as it is set
    began = time.monotonic()
    client.ping()
    assert time.monotonic() - began < 1


def test_hold_stops_everything_for_its_time_and_loses_nothing(rig: Rig) -> None:
    client = rig.client()
    client.xgroup_create(rig.key, "group", id="0", mkstream=True)
    answers: list[Any] = []
    reader = threading.Thread(
        target=lambda: answers.append(rig.client().xreadgroup("group", "me", {rig.key: ">"}, block=3000))
    )
    reader.start()
    time.sleep(0.2)
    began = time.monotonic()
    hits = rig.proxy.hold(ME, 0.6)
    rig.direct.xadd(rig.key, {"a": 1})
    client.ping()
    assert time.monotonic() - began >= 0.55
    reader.join(2)
    assert answers and answers[0]
    assert hits.held == 2  # the answer of the one, the request of the other


def test_cut_breaks_a_connection_in_the_middle_of_a_request(rig: Rig) -> None:
    refused = done = 0
    for _ in range(30):
        client = rig.client()
        client.ping()
        before = rig.direct.llen(rig.key)
        hits = rig.proxy.cut(ME, within_s=5.0)
        with pytest.raises((redis.exceptions.ConnectionError, OSError)):
            client.eval(ADD, 1, rig.key, "x")
        time.sleep(0.02)
        assert hits.cut >= 1
        after = rig.direct.llen(rig.key)
        refused, done = refused + (after == before), done + (after == before + 1)
        client.ping()
        client.close()
    assert refused + done == 30
    assert min(refused, done) > 0  # half of them were carried out, and nobody was told


def test_cut_ends_a_read_that_waits_and_what_stays_silent(rig: Rig) -> None:
    silent, waiting, errors = rig.client(), rig.client(), []
    silent.ping()
    waiting.xgroup_create(rig.key, "group", id="0", mkstream=True)

    def read() -> None:
        try:
            waiting.xreadgroup("group", "me", {rig.key: ">"}, block=5000)
        except redis.exceptions.ConnectionError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    began = time.monotonic()
    hits = rig.proxy.cut(ME, within_s=1.5)
    assert hits.cut == 1
    reader.join(3)
    assert errors and time.monotonic() - began < 1.4
    eventually(lambda: hits.cut == 2)


# --- other processes -------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from common.wire.connect import connect
client = connect(sys.argv[1])
client.ping()
print("ready", flush=True)
for line in sys.stdin:
    print(client.eval("return redis.call('INCR', KEYS[1])", 1, sys.argv[2]), flush=True)
"""

# Every answer must be the one to its own question, whatever happens meanwhile; broken connections are made again.
CHECKER = """
import random, sys, time
import redis
from common.wire.connect import connect
client, rng = connect(sys.argv[1]), random.Random(int(sys.argv[3]))
script = client.register_script("return {ARGV[1], {ARGV[2]}}")
asked = broken = 0
until = time.monotonic() + float(sys.argv[4])
while time.monotonic() < until:
    try:
        if rng.random() < 0.5:
            size = rng.choice([0, 10, 1000, 70_000])
            word = rng.randbytes(8)
            assert script([sys.argv[2]], [word, b"x" * size]) == [word, [b"x" * size]]
        else:
            pipe = client.pipeline(transaction=rng.random() < 0.3)
            words = [rng.randbytes(rng.choice([1, 100, 30_000])) for _ in range(rng.randrange(1, 8))]
            plain = rng.random() < 0.3
            for word in words:
                pipe.echo(word) if plain else pipe.evalsha(script.sha, 1, sys.argv[2], word, "")
            assert [a if plain else a[0] for a in pipe.execute()] == words
        asked += 1
    except (redis.exceptions.ConnectionError, OSError):
        broken += 1
    except redis.exceptions.NoScriptError:
        client.script_load(script.script)
print(asked, broken)
"""


def begin(code: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_fault_hits_its_own_process_alone(rig: Rig) -> None:
    url = f"unix://{rig.socket}?db=0"
    hit, spared = begin(WRITER, url, rig.key), begin(WRITER, url, f"{rig.key}:2")
    try:
        for process in (hit, spared):
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        hits = rig.proxy.duplicate(hit.pid, 60.0)
        for _ in range(5):
            ask(hit)
            ask(spared)
        eventually(lambda: hits.duplicated == 5)
        assert (rig.direct.get(rig.key), rig.direct.get(f"{rig.key}:2")) == (b"10", b"5")
    finally:
        end(hit)
        end(spared)
    eventually(lambda: not rig.proxy.sides)  # killed, they left nothing behind


@pytest.mark.slow
def test_no_answer_is_ever_wrong_while_faults_come_and_go(rig: Rig) -> None:
    rng = random.Random(3)
    processes = [begin(CHECKER, f"unix://{rig.socket}?db=0", rig.key, seed, 5.0) for seed in range(3)]
    faults: list[Callable[[int], object]] = [
        lambda pid: rig.proxy.delay(pid, 0.01, rng.uniform(0.05, 0.4)),
        lambda pid: rig.proxy.duplicate(pid, rng.uniform(0.05, 0.4)),
        lambda pid: rig.proxy.swap(pid, rng.uniform(0.05, 0.4)),
        lambda pid: rig.proxy.hold(pid, rng.uniform(0.01, 0.1)),
        lambda pid: rig.proxy.cut(pid, 0.1) if rng.random() < 0.2 else None,
        rig.proxy.clear,
    ]
    totals: dict[str, int] = {}
    done = []
    try:
        while any(process.poll() is None for process in processes):
            done.append(rng.choice(faults)(rng.choice(processes).pid))
            time.sleep(rng.uniform(0.0, 0.1))
        for process in processes:
            asked, broken = map(int, process.communicate()[0].split())
            assert process.returncode == 0
            assert asked > 20
            assert broken < asked
    finally:
        for process in processes:
            end(process)
    for hits in filter(None, done):
        for name in hits.__slots__:  # type: ignore[attr-defined]
            totals[name] = totals.get(name, 0) + getattr(hits, name)
    assert all(totals.values()), totals


# --- nothing is left behind ------------------------------------------------------------------------------------------


def test_a_redis_that_is_killed_and_comes_back(own_redis: EmbeddedRedis) -> None:
    rig = Rig(own_redis)
    client = rig.client()
    client.set(rig.key, "kept")
    rig.direct.close()
    before = sockets()
    try:
        for _ in range(3):
            time.sleep(1.1)  # the append-only file is brought to the disk once a second
            os.kill(own_redis.pid, 9)
            eventually(lambda: not rig.proxy.sides)  # connections end with it
            for _ in range(100):
                began = time.monotonic()
                with pytest.raises((redis.exceptions.ConnectionError, OSError)):
                    client.ping()
                assert time.monotonic() - began < 1
            eventually(lambda: not own_redis.running())
            own_redis.start()
            assert client.get(rig.key) == b"kept"
        rig.proxy.swap(ME, 60.0)
        for _ in range(50):
            client.eval(ADD, 1, f"{rig.key}:2", "x")
        os.kill(own_redis.pid, 9)  # copies are still on their way
        time.sleep(2.2)
        eventually(lambda: not own_redis.running() and not rig.proxy.sides)
        own_redis.start()
        client.ping()
        eventually(lambda: sockets() <= before)
    finally:
        rig.close()


def test_files_do_not_grow_with_connections(rig: Rig) -> None:
    rig.direct.close()
    rig.client().ping()
    before = open_files()
    for index in range(300):
        client: Any = connect(f"unix://{rig.socket}?db=0")
        if index % 3 == 0:
            rig.proxy.cut(ME)
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                client.ping()
        else:
            client.ping()
        client.close()
    eventually(lambda: open_files() <= before)


def test_close_ends_everything_within_a_second(any_redis: EmbeddedRedis) -> None:
    before, threads = sockets(), threading.active_count()
    rig = Rig(any_redis)
    client, errors = rig.client(), []

    def wait() -> None:
        try:
            client.blpop([rig.key], timeout=20)
        except (redis.exceptions.ConnectionError, OSError) as error:
            errors.append(error)

    reader = threading.Thread(target=wait)
    reader.start()
    rig.proxy.swap(ME, 60.0)
    rig.client().eval("return 1", 0)  # a late copy is on its way
    rig.proxy.hold(ME, 60.0)
    time.sleep(0.2)
    began = time.monotonic()
    rig.proxy.close()
    reader.join(1)
    assert time.monotonic() - began < 1
    assert errors
    assert not rig.socket.exists()
    rig.close()
    assert threading.active_count() == threads
    eventually(lambda: sockets() == before)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    proxy = RedisProxy(tmp_path / ("d" * 100), tmp_path / "upstream")
    with pytest.raises(OSError, match="too long"):
        proxy.start()
    proxy.close()
