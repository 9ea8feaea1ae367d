"""A real run on other signals than the default: a policy that reads margins, masking in place of stopping, and forward
KL on the teacher's own outcomes too, and adapters with dropout. Workers are killed; the verdicts come out the same from
the record."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, check_views, children_of, finish, read, start, wait_for_steps

from ops.chaos.checker import check_folder

pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = (
    *SMALL,
    "learner.max_steps=5",
    "termination.policy=margin_change",
    "termination.margin_drift=0.05",
    "termination.margin_threshold=1",
    "termination.apply=mask",
    "termination.control_fraction=0.4",
    "termination.min_calibration=8",
    "loss.mode=forward_kl_topk_tail",
    "rollout.teacher_support=2",
    "learner.lora.rank=8",
    "learner.lora.dropout=0.05",
    "learner.learning_rate=2e-3",
    "eval.every_steps=0",
    "feeder.record_audit=true",
)


def test_a_run_by_margins_with_forward_kl_goes_on_after_killed_workers(tmp_path: Path) -> None:
    """The teacher's two likeliest ids besides the student's eight leave little of its mass outside."""
    folder = tmp_path / "e2e"
    process = start(tmp_path, settings=SETTINGS)
    wait_for_steps(folder, 2, process)
    running = children_of(folder)
    for role in ("learner", next(name for name in running if name.startswith("teacher"))):
        os.kill(running[role], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=5)
    assert check_folder(folder) == []
    steps = read(folder / "metrics.jsonl")
    assert all(line["support_mass_teacher"] > 0.98 for line in steps)
    assert all(line["topk_overlap"] > 0.9 for line in steps), "of the student's own eight alone"
    assert steps[0]["loss"] < steps[0]["kl"], "forward KL of this pair is half its reverse KL"
    check_views(folder, stopped_by=None)
