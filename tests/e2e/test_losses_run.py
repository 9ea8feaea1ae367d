"""Whole runs with other losses than the default, with real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, children_of, finish, read, start, wait_for_steps

from ops.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_forward_kl_on_the_teachers_own_outcomes_too_also_after_killed_workers(tmp_path: Path) -> None:
    """The teacher's two likeliest ids besides the student's eight leave little of its mass outside."""
    folder = tmp_path / "e2e"
    process = start(
        tmp_path,
        settings=(*SMALL, "loss.mode=forward_kl_topk_tail", "rollout.teacher_support=2", "learner.max_steps=5"),
    )
    wait_for_steps(folder, 2, process)
    running = children_of(folder)
    for role in ("learner", next(name for name in running if name.startswith("teacher"))):
        os.kill(running[role], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=5)
    steps = read(folder / "metrics.jsonl")
    assert all(line["support_mass_teacher"] > 0.98 for line in steps)
    assert all(line["topk_overlap"] > 0.9 for line in steps), "of the student's own eight alone"
    assert steps[0]["loss"] < steps[0]["kl"], "forward KL of this pair is half its reverse KL"
    assert main(["replay", str(folder), "--sweep", "termination.eta=0.3,0.6"]) == 0
