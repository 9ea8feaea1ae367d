"""A learner of several processes in real runs: other numbers of ranks on resume, a killed rank, torchrun."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from real_runs import DEMO, SMALL, check_books, finish, read, start, wait_for_steps

from ops.reach.embedded import EmbeddedRedis
from ops.run.ranks import TITLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ranks_of(folder: Path, *, by_torchrun: bool = False) -> list[int]:
    """The learner's processes beside rank 0."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            environment = (entry / "environ").read_bytes().decode().split("\0") if by_torchrun else []
        except OSError:
            continue
        title = "learner" if by_torchrun else TITLE
        if (
            title in words
            and any(str(folder) in word for word in words)
            and (not by_torchrun or "RANK=1" in environment)
        ):
            found.append(int(entry.name))
    return found


def wait_for_rank(folder: Path, *, by_torchrun: bool = False) -> int:
    deadline = time.monotonic() + 60
    while not (found := ranks_of(folder, by_torchrun=by_torchrun)):
        assert time.monotonic() < deadline, "no rank beside rank 0"
        time.sleep(0.1)
    return found[0]


def test_a_run_goes_from_one_rank_to_two_and_back_with_a_kill_in_between(tmp_path: Path) -> None:
    folder, ends = tmp_path / "ranks", []
    steps = ("learner.max_steps=16", "eval.every_steps=0", "learner.learning_rate=1e-5")
    process = start(tmp_path, name="ranks", settings=(*SMALL, *steps))
    for resumed in ("2", "1"):
        wait_for_steps(folder, len(ends) * 4 + 2, process)
        if resumed == "1":  # two ranks are at work
            os.kill(wait_for_rank(folder), signal.SIGKILL)
            wait_for_steps(folder, len(read(folder / "metrics.jsonl")) + 3, process)
        process.send_signal(signal.SIGINT)
        code, output = finish(process, timeout_s=60)
        assert code == 130, output
        assert not ranks_of(folder), "a rank was left behind"
        ends.append(len(read(folder / "metrics.jsonl")))
        process = start(tmp_path, "--resume", "--set", f"learner.nproc_per_node={resumed}", name="ranks")
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=16)
    assert re.search(r"error: .*rank 1 of the learner was ended by signal 9", (folder / "logs/learner.log").read_text())
    lines = read(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 17))
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)), "a rollout was trained twice"
    losses = [line["loss"] for line in lines]
    spread = statistics.pstdev(losses[: ends[0]] + losses[ends[1] :]) + 0.1 * statistics.fmean(losses)
    parts = [losses[: ends[0]], losses[ends[0] : ends[1]], losses[ends[1] :]]
    for before, after in pairwise(parts):
        assert abs(statistics.fmean(before) - statistics.fmean(after)) < 3 * spread, losses


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_torchrun_starts_the_learner_and_starts_it_anew_when_a_rank_is_killed(
    embedded_redis: EmbeddedRedis, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    redis = [f"redis.url={embedded_redis.url}", f"redis.broker_url={embedded_redis.broker_url}"]
    settings = (*SMALL, "eval.every_steps=0", "learner.max_steps=5", f"runs_dir={tmp_path}", "name=torchrun", *redis)
    flags = [flag for item in (*settings, "liveness.learner_lease_s=4") for flag in ("--set", item)]

    def role(name: str, *launcher: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, *launcher, "-m", "ops.cli", name, str(DEMO), *flags]
        with (tmp_path / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=DEMO.parents[2])
        started.append(process)
        return process

    for worker in ("teacher", "rollout"):
        role(worker)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    learner = role("learner", *torchrun)
    ending = [role("feeder"), role("arbiter")]
    folder = tmp_path / "torchrun"
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(read(folder / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline and learner.poll() is None, (tmp_path / "learner.log").read_text()[-3000:]
        time.sleep(0.2)
    os.kill(wait_for_rank(tmp_path, by_torchrun=True), signal.SIGKILL)
    for process in (learner, *ending):
        assert process.wait(300) == 0, (tmp_path / "learner.log").read_text()[-3000:]
    check_books(folder, steps=5)
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)), "a rollout was trained twice"
