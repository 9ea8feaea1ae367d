"""`deterministic`, with real processes: what a run ends with does not depend on when it was interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_run import check_books, finish, read, start, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
EXACT = (
    "deterministic=true",
    "learner.batch_size=8",
    "learner.max_steps=6",
    "rollout.slots=4",  # fewer than a batch: who shares the engine is a matter of timing
    "rollout.max_completion_length=48",
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


def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    code, output = finish(start(tmp_path, name="whole", settings=EXACT))
    assert code == 0, output
    expected = result(tmp_path / "whole")
    summary = check_books(tmp_path / "whole", steps=6)
    assert summary["finish_reasons"].get("kl_trap", 0) > 0, "the rule cut nothing: the threshold was put to no test"

    folder = tmp_path / "broken"
    process = start(tmp_path, name="broken", settings=EXACT)
    done = 1
    for later_s, number in ((0.1, signal.SIGTERM), (0.6, signal.SIGINT)):
        wait_for_steps(folder, done + 1, process)
        time.sleep(later_s)  # into the next batch
        process.send_signal(number)
        code, output = finish(process, timeout_s=40)
        assert code == 130, output
        done = len(read(folder / "metrics.jsonl"))
        process = start(tmp_path, "--resume", name="broken")
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=6)
    found = result(folder)
    for name, value in expected.items():
        assert found[name] == value, name
