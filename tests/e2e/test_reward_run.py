"""Rewards with real processes: killed learners and feeders, advantages that the checker recomputes, and the same bits
after an interruption."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, children_of, finish, read, start, wait_for_steps

from ops.chaos.checker import check_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
REWARD = ("reward.mode=grpo", "reward.weight=0.2", "data.num_generations=4")


def test_a_run_whose_learner_and_feeder_are_killed_trains_with_the_advantages_of_its_verdicts(tmp_path: Path) -> None:
    folder = tmp_path / "e2e"
    few_cuts = ("termination.control_fraction=0.6", "eval.every_steps=0", "reward.of_cut=as_wrong")
    process = start(tmp_path, settings=(*SMALL, *REWARD, *few_cuts, "learner.max_steps=8"))
    for steps, role in ((1, "learner"), (2, "feeder"), (4, "learner")):
        wait_for_steps(folder, steps, process)
        os.kill(children_of(folder)[role], signal.SIGKILL)
        time.sleep(0.5)
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=8)
    assert check_folder(folder) == []
    trained = read(folder / "trained.jsonl")
    advantages = [one for line in trained for one in line["advantages"]]
    assert len(advantages) == 8 * 16
    assert min(advantages) < 0 < max(advantages), "nobody was compared"
    rewards = json.loads((folder / "summary.json").read_text())["rewards"]
    assert rewards["with_signal"] >= 1
    assert f"{rewards['groups']} groups rewarded" in output
    assert {line["reward"] for line in read(folder / "rollouts.jsonl") if line["ending"] == "trained"} <= {
        "right",
        "wrong",
    }


def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """A batch of six and groups of four: every other batch splits one."""
    settings = (
        *("deterministic=true", "learner.batch_size=6", "learner.max_steps=6", "rollout.slots=4"),
        *("rollout.max_completion_length=84", "termination.policy=none", "checkpoints.every_steps=2"),
        *("eval.every_steps=0", *REWARD),
    )
    code, output = finish(start(tmp_path, name="whole", settings=settings))
    assert code == 0, output
    process = start(tmp_path, name="broken", settings=settings)
    wait_for_steps(tmp_path / "broken", 1, process)
    os.kill(children_of(tmp_path / "broken")["learner"], signal.SIGKILL)
    wait_for_steps(tmp_path / "broken", 3, process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    code, output = finish(start(tmp_path, "--resume", name="broken"))
    assert code == 0, output
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert check_folder(whole) == check_folder(broken) == []
    expected = read(whole / "trained.jsonl")
    names = ("step", "rids", "digests", "advantages", "without_reward")
    assert [[line[name] for name in names] for line in read(broken / "trained.jsonl")] == [
        [line[name] for name in names] for line in expected
    ]
    reasons = [reason for line in expected for reason in line["without_reward"]]
    assert {"", "split"} <= set(reasons), "neither a whole group nor a split one was put to the test"
    assert (broken / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
