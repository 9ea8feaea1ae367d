"""A learner of several processes in real runs: other numbers of ranks on resume, a killed rank."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, finish, read, start, wait_for_steps

from ops.run.ranks import TITLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ranks_of(folder: Path) -> list[int]:
    """The learner's processes beside rank 0."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if TITLE in words and any(str(folder) in word for word in words):
            found.append(int(entry.name))
    return found


def wait_for_rank(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (found := ranks_of(folder)):
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
