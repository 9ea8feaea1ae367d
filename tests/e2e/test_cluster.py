"""Each role a process of its own on a Redis that all share, as on a cluster; one worker started by Celery itself, the
learner by torchrun, which starts it anew when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_runs import DEMO, SMALL, check_books, read

from ops.cli.main import main
from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_rank_1(folder: Path) -> int:
    """The learner's process beside rank 0, of those that torchrun started with a command that names the folder."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                environment = (entry / "environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "learner" in words and any(str(folder) in word for word in words) and "RANK=1" in environment:
                return int(entry.name)
        time.sleep(0.1)
    pytest.fail("no rank beside rank 0")


def test_roles_started_one_by_one_train_with_a_killed_rank_and_a_finished_run_goes_on(
    embedded_redis: EmbeddedRedis,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    redis = [f"redis.url={embedded_redis.url}", f"redis.broker_url={embedded_redis.broker_url}"]
    settings = (*SMALL, "eval.every_steps=0", "learner.max_steps=5", f"runs_dir={tmp_path}", "name=cluster", *redis)
    settings += ("liveness.learner_lease_s=4",)

    def role(name: str, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        flags = [flag for item in (*settings, *more) for flag in ("--set", item)]
        command = [sys.executable, *launcher, "-m", "ops.cli", name, str(DEMO), *flags]
        with (tmp_path / f"{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=DEMO.parents[2])
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
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    learner, arbiter = role("learner", launcher=torchrun), role("arbiter")
    time.sleep(1)
    feeder = role("feeder")
    folder = tmp_path / "cluster"
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(read(folder / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline and learner.poll() is None, (tmp_path / "learner.log").read_text()[-3000:]
        time.sleep(0.2)
    os.kill(wait_for_rank_1(tmp_path), signal.SIGKILL)
    for process in (learner, feeder, arbiter):
        assert process.wait(300) == 0, (tmp_path / "learner.log").read_text()[-3000:]
    check_books(folder, steps=5)
    assert (folder / "report.png").exists()

    # More steps: the feeder opens the run again, the same workers take it up; a learner of one process goes on.
    again = [role(name, "learner.max_steps=7") for name in ("feeder",)]
    deadline = time.monotonic() + 60
    while not json.loads((folder / "ledger.json").read_text())["open"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    again += [role(name) for name in ("learner", "arbiter")]
    for process in again:
        assert process.wait(300) == 0
    check_books(folder, steps=7)
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)), "a rollout was trained twice"

    # A role whose config would change what is on record is refused.
    assert main(["feeder", str(DEMO), *(flag for item in (*settings, "seed=9") for flag in ("--set", item))]) == 2
    assert "seed: 0 cannot become 9" in capsys.readouterr().err
    assert main(["clean", str(folder)]) == 0
    assert not folder.exists()
