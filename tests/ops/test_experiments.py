"""The shipped configs: none.yaml is demo.yaml without termination, and all of them say what they set."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from common.config import load
from ops.cli import _parser
from ops.compare_grid import read_budget, read_rows, row_config

EXPERIMENTS = Path(__file__).parents[2] / "ops" / "experiments"


def test_none_is_the_demo_without_termination() -> None:
    demo, none = (yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()) for name in ("demo", "none"))
    assert (none.pop("name"), none["termination"].pop("policy")) == ("none", "none")
    assert (demo.pop("name"), demo["termination"].pop("policy")) == ("demo", "kat")
    assert none == demo


def test_qwen3_math_has_the_paper_s_setting() -> None:
    config = load(EXPERIMENTS / "qwen3-math.yaml")
    rule, learner, rollout = config.termination, config.learner, config.rollout
    assert (config.student.model, config.teacher.model) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")
    assert (rule.window, rule.patience, rule.eta, rule.teacher_top_k) == (64, 4, 0.3, 64)
    assert (rule.min_calibration, rule.buffer_size, rule.warmup_steps) == (512, 4096, 50)
    assert (rollout.temperature, rollout.top_p, rollout.dtype) == (1.0, 0.95, "bfloat16")
    assert (learner.learning_rate, learner.schedule, learner.warmup_ratio) == (1e-6, "cosine", 0.03)


def test_every_setting_of_the_demo_is_explained_or_plain() -> None:
    lines = [line for line in (EXPERIMENTS / "demo.yaml").read_text().splitlines() if line.startswith("  ")]
    assert sum("#" in line for line in lines) >= 0.9 * len(lines)


def test_every_command_of_make_evidence_is_one_that_katana_takes(tmp_path: Path) -> None:
    """The script itself, with a katana that only notes what it is asked; asked again, it goes through once more."""
    script = tmp_path / "ops" / "experiments" / "evidence.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(EXPERIMENTS / "evidence.sh", script)
    katana = tmp_path / ".venv" / "bin" / "katana"
    katana.parent.mkdir(parents=True)
    katana.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    katana.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "docs" / "evidence") == []
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    assert {call[0] for call in calls} == {"compare", "run", "replay", "audit", "pretrain"}
    for call in calls:
        _check(call)


def _check(call: list[str]) -> None:
    def given(option: str) -> list[str]:
        return [value for name, value in itertools.pairwise(call) if name == option]

    sets = [one for one in given("--set") if not one.startswith(("student.model=", "teacher.model="))]
    _parser().parse_args(call)
    if call[0] == "compare":
        base = load(EXPERIMENTS / "demo.yaml", sets)
        budget = given("--budget")
        tokens = read_budget(budget[0]) if budget else None
        for row in read_rows(given("--policies")[0], given("--variant")):
            row_config(base, row, tokens)
    elif call[0] == "run":
        assert load(EXPERIMENTS / "demo.yaml", sets).termination.shadow
