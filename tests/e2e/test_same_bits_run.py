"""`deterministic` with LoRA, a reward and two teachers: a run that was killed into and interrupted, with more workers,
ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from real_runs import DEMO, TEACHERS, check_books, children_of, finish, read, start, wait_for_steps

from ops.chaos.checker import check_folder
from ops.tasks.pretrain import shift

pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 6
EXACT = (
    "deterministic=true",
    "student.model=ops/models/student",
    "data.num_generations=4",
    "learner.num_iterations=2",
    "learner.batch_size=6",  # every other batch splits a group of four
    f"learner.max_steps={STEPS}",
    "learner.lora.rank=8",
    "learner.learning_rate=2e-3",
    "reward.mode=grpo",
    "reward.weight=0.2",
    "rollout.slots=4",
    "rollout.max_completion_length=84",
    "termination.policy=none",
    "checkpoints.every_steps=2",
    "eval.every_steps=0",
)


def test_a_killed_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, broken, shifted = (tmp_path / name for name in ("whole", "broken", "shifted"))
    shift(DEMO.parents[1] / "models" / "teacher", shifted)
    settings = (*EXACT, f"teachers.shifted.model={shifted}")
    code, output = finish(start(tmp_path, name="whole", settings=settings, config=TEACHERS))
    assert code == 0, output
    more = (*settings, "teachers.plain.workers=2")
    process = start(tmp_path, name="broken", settings=more, config=TEACHERS)
    wait_for_steps(broken, 1, process)
    os.kill(children_of(broken)["learner"], signal.SIGKILL)
    wait_for_steps(broken, 3, process)
    time.sleep(0.2)  # into the next batch
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    code, output = finish(start(tmp_path, "--resume", name="broken"))
    assert code == 0, output

    for folder in (whole, broken):
        check_books(folder, steps=STEPS)
        assert check_folder(folder) == []
        assert {line["teacher"] for line in read(folder / "rollouts.jsonl")} == {"plain", "shifted"}
    for name, fields in (
        ("metrics.jsonl", ("step", "loss", "reuse")),
        ("trained.jsonl", ("step", "rids", "digests", "advantages", "without_reward")),
    ):
        expected, found = ([[line[field] for field in fields] for line in read(one / name)] for one in (whole, broken))
        assert found == expected, name
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    reasons = {reason for line in read(whole / "trained.jsonl") for reason in line["without_reward"]}
    assert {"", "split"} <= reasons, "neither a whole group nor a split one was put to the test"
