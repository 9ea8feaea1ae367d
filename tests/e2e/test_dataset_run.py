"""A config of the paper's grid on tiny models of the same architecture and a few rows of each data set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import put_paper_data, put_tiny_qwen3

# Most of it is imports in eight processes, which a busy machine draws out.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(780)]
CONFIG = Path(__file__).parents[2] / "ops" / "experiments" / "paper" / "1.7b-kat.yaml"
# Where and how long it runs; data, chat template, verifier, rule and loss are the config's.
SMALL = (
    "teacher.device=cpu",
    "rollout.device=cpu",
    "learner.device=cpu",
    "eval.device=cpu",
    "rollout.dtype=float32",  # bfloat16 is slow on a CPU
    "teacher.dtype=float32",
    "learner.dtype=float32",
    "rollout.slots=4",  # slots cost time whether or not something is written in them
    "teacher.slots=8",
    "eval.slots=8",
    "data.max_prompt_length=160",
    "rollout.max_completion_length=96",
    "learner.batch_size=4",
    "learner.max_steps=2",
    "eval.every_steps=2",
    "eval.k=2",
    "eval.data.amc.k=3",
    "eval.data.aime24.k=3",
)


def test_the_paper_s_config_runs_on_tiny_models(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    put_paper_data(tmp_path)
    student, teacher = put_tiny_qwen3(tmp_path / "student", seed=1), put_tiny_qwen3(tmp_path / "teacher", seed=2)
    settings = (f"student.model={student}", f"teacher.model={teacher}", f"runs_dir={tmp_path / 'runs'}", *SMALL)
    command = [sys.executable, "-m", "ops.cli", "run", str(CONFIG), "--name", "tiny"]
    command += [part for setting in settings for part in ("--set", setting)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its roles
            told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    folder = tmp_path / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["ledger"]["open"] == 0
    books = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert sum(line["ending"] == "trained" for line in books) == 8
    assert all(line["correct"] is False for line in books if line["ending"] == "trained")  # random weights know nothing
    last = summary["eval"][-1]
    assert {name: (one["n"], one["k"]) for name, one in last["benchmarks"].items()} == {
        "amc": (1, 3),
        "math500": (1, 2),
        "minervamath": (1, 2),
        "aime24": (1, 3),
    }
