"""The experiments in small, with real runs: policies, mask, shadow, one's own policy, an exchanged end token, under one
budget of tokens; then replay and audit of what they left."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
TOKENS = 16_000
SMALL = (
    "learner.batch_size=16",
    "rollout.slots=16",
    "termination.min_calibration=16",
    "termination.warmup_steps=1",
    "termination.eta=0.3",
    "eval.problems=8",
    "eval.k=2",
    "eval.every_steps=1000",
)
VARIANTS = (
    "masked:termination.apply=mask",
    "shadow:termination.shadow=true",
    "own:termination.policy=my_policies:Halved,termination.options.head=16,termination.patience=8",
    "by_token:termination.policy=none,rollout.stop_set=student",
)


def katana(folder: Path, *arguments: str, timeout_s: float = 700) -> str:
    """What the command prints. Its working directory is the project's; a module of the user's lies in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_small_experiments_from_comparison_to_audit(tmp_path: Path) -> None:
    # The policy that docs/policies.md shows, as it stands there.
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.DOTALL)
    assert shown is not None
    (tmp_path / "my_policies.py").write_text(shown[1])
    katana(tmp_path, "pretrain", "--exchange-end", "ops/models/student", "--out", str(tmp_path / "student"))
    settings = [flag for item in (f"runs_dir={tmp_path}", *SMALL) for flag in ("--set", item)]
    settings += ["--set", f"student.model={tmp_path / 'student'}"]
    rows = [flag for variant in VARIANTS for flag in ("--variant", variant)]
    grid = ["--name", "grid", "--policies", "kat,random_matched", "--seeds", "0", "--budget", f"tokens:{TOKENS}"]
    demo = str(ROOT / "ops" / "experiments" / "demo.yaml")
    output = katana(tmp_path, "compare", demo, *settings, *grid, *rows)
    assert "NOT DONE" not in output
    assert "## Was random_matched matched?" in output
    with (tmp_path / "grid" / "compare.csv").open() as file:
        cells = {row["row"]: row for row in csv.DictReader(file)}
    assert list(cells) == ["kat", "random_matched", "masked", "shadow", "own", "by_token"]
    for row in cells.values():
        assert row["state"] == "done" and int(row["tokens_generated"]) >= TOKENS
    trained = {label: int(row["tokens_trained"]) / int(row["tokens_generated"]) for label, row in cells.items()}
    assert int(cells["kat"]["tokens_detection"]) > 0 and int(cells["own"]["tokens_detection"]) > 0
    assert int(cells["masked"]["tokens_overshoot"]) > int(cells["kat"]["tokens_overshoot"])  # written to the end
    assert trained["masked"] < trained["shadow"]

    shadow = str(tmp_path / "grid" / "shadow-s0")
    output = katana(tmp_path, "replay", shadow, "--sweep", "termination.eta=0.3,0.6")
    recorded = re.search(r"([\d,]+) of ([\d,]+) recorded verdicts come out the same", output)
    assert recorded is not None and recorded[1] == recorded[2]
    assert (tmp_path / "grid" / "shadow-s0" / "replay" / "replay.csv").is_file()
    output = katana(tmp_path, "audit", shadow, "--rollouts", "6", "--samples", "2")
    assert "recoverable" in output
    assert (tmp_path / "grid" / "shadow-s0" / "audit" / "audit.csv").is_file()
