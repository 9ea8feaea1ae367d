"""`deterministic`, with real processes: what a run ends with depends neither on interruptions nor on its memory."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from real_runs import check_books, finish, read, start, wait_for_steps
from small_redis import SHORT, leave_least

from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 12
EXACT = (
    "deterministic=true",
    "learner.batch_size=8",
    f"learner.max_steps={STEPS}",
    "rollout.slots=4",  # fewer than a batch: who shares the engine is a matter of timing
    "rollout.max_completion_length=84",
    "termination.teacher_top_k=32",  # few tokens fill a Redis
    "termination.window=8",
    "termination.patience=2",
    "termination.grace_tokens=0",
    "termination.eta=0.3",
    "termination.min_calibration=4",
    "termination.warmup_steps=1",
    "checkpoints.every_steps=2",
    "eval.every_steps=0",
)


def result(folder: Path) -> dict[str, Any]:
    """What must not depend on an interruption."""
    steps, trained = read(folder / "metrics.jsonl"), read(folder / "trained.jsonl")
    lines = sorted(read(folder / "rollouts.jsonl"), key=lambda line: str(line["rid"]))
    return {
        "losses": [(line["step"], line["loss"], line["grad_norm"]) for line in steps],
        "trained": [(line["step"], line["rids"], line["tokens"], line["digests"]) for line in trained],
        "rollouts": [
            tuple(line[name] for name in ("rid", "ending", "tokens_kept", "threshold", "min_window", "correct"))
            for line in lines
        ],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run with all the memory it wants comes to that nobody interrupts."""
    folder = tmp_path_factory.mktemp("deterministic")
    code, output = finish(start(folder, name="whole", settings=EXACT))
    assert code == 0, output
    summary = check_books(folder / "whole", steps=STEPS)
    assert summary["finish_reasons"].get("kl_trap", 0) > 0, "the rule cut nothing: the threshold was put to no test"
    return result(folder / "whole")


def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, expected: dict[str, Any]) -> None:
    folder = tmp_path / "broken"
    process = start(tmp_path, name="broken", settings=EXACT)
    wait_for_steps(folder, 4, process)
    time.sleep(0.1)  # into the next batch
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    code, output = finish(start(tmp_path, "--resume", name="broken"))
    assert code == 0, output
    check_books(folder, steps=STEPS)
    found = result(folder)
    for name, value in expected.items():
        assert found[name] == value, name


def test_a_run_on_little_memory_ends_with_the_same_bits(
    tmp_path: Path, small_redis: EmbeddedRedis, expected: dict[str, Any]
) -> None:
    # No checkpoint is due before the last step: whatever room is made is made because there is none.
    settings = leave_least(small_redis, (*EXACT, "checkpoints.every_steps=1000"))
    code, output = finish(start(tmp_path, name="little", settings=settings))
    assert code == 0, output
    assert SHORT in (tmp_path / "little" / "logs" / "learner.log").read_text()
    found = result(tmp_path / "little")
    for name, value in expected.items():
        if name == "rollouts":  # how much of what was cut had been scored, and so is judged, is a matter of timing
            assert [line[:-1] for line in found[name]] == [line[:-1] for line in value]
        else:
            assert found[name] == value, name
