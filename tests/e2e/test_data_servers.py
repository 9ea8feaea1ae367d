"""A whole run on three data servers, of which one is killed and started again; it is resumed on the same ones alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, finish, read, start, wait_for_steps

from common.config import load
from common.wire.connect import connect
from common.wire.planes import open_planes
from ops.chaos.checker import Allowed, check_folder, check_redis
from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
RECORDED = ("feeder.record_traces=true", "feeder.record_audit=true")


def settings(servers: list[EmbeddedRedis], *more: str) -> tuple[str, ...]:
    urls = json.dumps([server.url for server in servers])
    return (*SMALL, *RECORDED, "eval.every_steps=0", f"redis.data={urls}", *more)


def check(folder: Path, servers: list[EmbeddedRedis], steps: int) -> None:
    """Nothing was lost or trained twice, nothing is left on any server, and each had a part of the run."""
    summary = check_books(folder, steps)
    clients = [connect(server.url) for server in servers]
    assert check_folder(folder, Allowed()) == []
    key = json.loads((folder / "run.json").read_text())["run_key"]
    assert check_redis(clients, key, folder, Allowed()) == []
    planes = open_planes(load(folder / "config.yaml"), clients, key)
    admitted = [part.ledger()["admitted"] for part in planes.parts]
    assert min(admitted) > 0
    assert sum(admitted) == summary["ledger"]["admitted"]
    assert summary["ledger"]["by_server"] == admitted
    trained = Counter(rid for line in read(folder / "trained.jsonl") for rid in line["rids"])
    assert set(trained.values()) == {1}


def test_a_run_goes_on_when_a_server_was_killed_and_is_resumed_on_the_same_servers_alone(
    three_servers: list[EmbeddedRedis], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle of a step; it is started again on its append-only file. Later Ctrl-C."""
    process = start(tmp_path, settings=settings(three_servers, "learner.max_steps=10"))
    folder = tmp_path / "e2e"
    wait_for_steps(folder, 1, process)
    killed = three_servers[1]
    os.kill(killed.pid, signal.SIGKILL)
    time.sleep(2.0)
    killed.stop()  # what is left of the process
    killed.start()
    wait_for_steps(folder, len(read(folder / "metrics.jsonl")) + 2, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output

    a, b, c = (server.url for server in three_servers)
    for urls, sentence in (
        ([a, b], "the run was begun on 3 data servers and cannot go on with 2"),
        ([a, c, b], f"{c} is server 2 of 3 of the list and has the part of server 3 of 3"),
    ):
        other = ["--set", f"redis.data={json.dumps(urls)}"]
        assert main(["run", str(folder / "config.yaml"), "--resume", *other]) == 2
        assert sentence in capsys.readouterr().err

    # What was refused has changed nothing: the run goes on without naming the servers again.
    code, output = finish(start(tmp_path, "--resume"))
    assert code == 0, output
    check(folder, three_servers, 10)
    assert "did not answer" in "".join(path.read_text() for path in (folder / "logs").glob("*.log"))
