"""One run of all that a config may ask for at once: two teachers, a reward, a forward KL that the teachers add to, a
policy and a weighting that read views, and LoRA. Learner and feeder are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from real_runs import DEMO, SMALL, check_books, children_of, finish, read, start, wait_for_steps

from ops.chaos.checker import check_folder
from ops.tasks.pretrain import shift

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOGETHER = (
    "student.model=ops/models/student",
    "data.num_generations=4",
    "reward.mode=grpo",
    "reward.weight=0.1",
    "reward.of_cut=as_wrong",
    "loss.mode=forward_kl_topk_tail",
    "loss.weighting=entropy",
    "rollout.teacher_support=2",
    "termination.policy=entropy",
    "termination.min_calibration=8",
    "learner.lora.rank=8",
    "learner.learning_rate=2e-3",
)


def test_a_run_of_everything_at_once_books_each_rollout_once(tmp_path: Path) -> None:
    folder, shifted = tmp_path / "all", tmp_path / "shifted"
    shift(DEMO.parents[1] / "models" / "teacher", shifted)
    settings = (*SMALL, *TOGETHER, f"teachers.shifted.model={shifted}", "learner.max_steps=8")
    process = start(tmp_path, name="all", settings=settings, config=DEMO.with_name("demo-teachers.yaml"))
    for steps, role in ((2, "learner"), (4, "feeder")):
        wait_for_steps(folder, steps, process)
        os.kill(children_of(folder)[role], signal.SIGKILL)
        time.sleep(0.5)
    code, output = finish(process)
    assert code == 0, output
    summary = check_books(folder, steps=8)
    assert check_folder(folder) == []  # each verdict and each advantage is computed again

    assert set(summary["teachers"]) == {"plain", "shifted"}
    assert summary["rewards"]["groups"] > 0
    lines = read(folder / "rollouts.jsonl")
    assert {line["teacher"] for line in lines} == {"plain", "shifted"}
    assert any(line["finish_reason"] == "low_entropy" for line in lines)
    trained = read(folder / "trained.jsonl")
    assert len({rid for line in trained for rid in line["rids"]}) == 8 * 16
    assert any(advantage for line in trained for advantage in line["advantages"])
    assert all(0 < line["support_mass_teacher"] <= 1.0001 for line in read(folder / "metrics.jsonl"))
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert (folder / "model" / "config.json").is_file()
