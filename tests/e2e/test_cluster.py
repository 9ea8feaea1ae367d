"""Each role a process of its own on a Redis that all share, as on a cluster; one worker started by Celery itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_runs import DEMO, SMALL, check_books

from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_roles_started_one_by_one_train_and_a_finished_run_goes_on(
    embedded_redis: EmbeddedRedis,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    redis = [f"redis.url={embedded_redis.url}", f"redis.broker_url={embedded_redis.broker_url}"]
    settings = (*SMALL, "eval.every_steps=0", "learner.max_steps=3", f"runs_dir={tmp_path}", "name=cluster", *redis)

    def role(name: str, *more: str) -> subprocess.Popen[str]:
        flags = [flag for item in (*settings, *more) for flag in ("--set", item)]
        command = [sys.executable, "-m", "ops.cli", name, str(DEMO), *flags]
        with (tmp_path / f"{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        started.append(process)
        return process

    # Workers before there is a run; the learner before the feeder that opens it.
    role("teacher")
    celery = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "actors.app", "worker", "-Q", "rollout", "--loglevel", "WARNING"],
        env=os.environ
        | {"KATANA_REDIS_URL": embedded_redis.url, "KATANA_BROKER_URL": embedded_redis.broker_url, "PYTHONPATH": "."},
        cwd=DEMO.parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    started.append(celery)
    learner, arbiter = role("learner"), role("arbiter")
    time.sleep(1)
    feeder = role("feeder")
    for process in (learner, feeder, arbiter):
        assert process.wait(180) == 0
    folder = tmp_path / "cluster"
    check_books(folder, steps=3)
    assert (folder / "report.png").exists()

    # More steps: the feeder opens the run again, the same workers take it up.
    again = [role(name, "learner.max_steps=5") for name in ("feeder",)]
    deadline = time.monotonic() + 60
    while not json.loads((folder / "ledger.json").read_text())["open"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    again += [role(name) for name in ("learner", "arbiter")]
    for process in again:
        assert process.wait(180) == 0
    check_books(folder, steps=5)

    # A role whose config would change what is on record is refused.
    assert main(["feeder", str(DEMO), *(flag for item in (*settings, "seed=9") for flag in ("--set", item))]) == 2
    assert "seed: 0 cannot become 9" in capsys.readouterr().err
    assert main(["clean", str(folder)]) == 0
    assert not folder.exists()
