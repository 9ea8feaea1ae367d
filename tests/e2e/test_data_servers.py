"""Whole runs on three data servers: one that is left alone, and one of whose servers is killed and started again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from real_runs import SMALL, check_books, finish, read, start, wait_for_steps

from common.config import load
from common.wire.connect import connect
from common.wire.planes import open_planes
from ops.chaos.checker import Allowed, check_folder, check_redis
from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
RECORDED = ("feeder.record_traces=true", "feeder.record_audit=true")


def settings(servers: list[EmbeddedRedis], *more: str) -> tuple[str, ...]:
    urls = json.dumps([server.url for server in servers])
    return (*SMALL, *RECORDED, "eval.every_steps=0", f"redis.data={urls}", *more)


def check(folder: Path, servers: list[EmbeddedRedis], steps: int) -> dict[str, Any]:
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
    trained = Counter(rid for line in read(folder / "trained.jsonl") for rid in line["rids"])
    assert set(trained.values()) == {1}
    return summary


def test_a_run_on_three_servers_closes_its_ledger(three_servers: list[EmbeddedRedis], tmp_path: Path) -> None:
    process = start(tmp_path, settings=settings(three_servers, "learner.max_steps=4"))
    code, output = finish(process)
    assert code == 0, output
    summary = check(tmp_path / "e2e", three_servers, 4)
    assert summary["ledger"]["by_server"] == [
        part.ledger()["admitted"]
        for part in open_planes(
            load(tmp_path / "e2e" / "config.yaml"),
            [connect(server.url) for server in three_servers],
            json.loads((tmp_path / "e2e" / "run.json").read_text())["run_key"],
        ).parts
    ]


def test_a_run_goes_on_when_one_of_its_servers_was_killed(three_servers: list[EmbeddedRedis], tmp_path: Path) -> None:
    """SIGKILL in the middle of a step; it is started again on its append-only file."""
    process = start(tmp_path, settings=settings(three_servers, "learner.max_steps=4"))
    folder = tmp_path / "e2e"
    wait_for_steps(folder, 1, process)
    killed = three_servers[1]
    os.kill(killed.pid, signal.SIGKILL)
    time.sleep(2.0)
    killed.stop()  # what is left of the process
    killed.start()
    code, output = finish(process)
    assert code == 0, output
    check(folder, three_servers, 4)
    assert "did not answer" in "".join(path.read_text() for path in (folder / "logs").glob("*.log"))


def test_a_run_is_not_resumed_on_other_servers(three_servers: list[EmbeddedRedis], tmp_path: Path) -> None:
    process = start(tmp_path, settings=settings(three_servers, "learner.max_steps=2"))
    wait_for_steps(tmp_path / "e2e", 1, process)
    process.send_signal(signal.SIGINT)
    finish(process)
    a, b, c = (server.url for server in three_servers)
    for urls, sentence in (
        ([a, b], "the run was begun on 3 data servers and cannot go on with 2"),
        ([a, c, b], f"{c} is server 2 of 3 of the list and has the part of server 3 of 3"),
    ):
        code, output = finish(start(tmp_path, "--resume", "--set", f"redis.data={json.dumps(urls)}"))
        assert (code, sentence in output) == (2, True), output
