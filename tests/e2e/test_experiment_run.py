"""The experiments in small, with real runs: compared under a budget of tokens, interrupted, resumed; replay and audit.

The rows are policies, shadow, and a custom policy that masks, with an exchanged end token.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import DEMO, check_books, children_of, finish, read, wait_for_steps

from ops.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = DEMO.parents[2]
TOKENS = 6_500
SMALL = (
    "learner.batch_size=16",
    "rollout.slots=16",
    "termination.min_calibration=16",
    "termination.control_fraction=0.4",
    "termination.warmup_steps=1",
    "termination.eta=0.3",
    "checkpoints.every_steps=2",
    "eval.problems=8",
    "eval.k=2",
    "eval.every_steps=1000",
)
VARIANTS = (
    "shadow:termination.shadow=true",
    "own:termination.policy=my_policies:Halved,termination.options.head=16,termination.patience=8,"
    "termination.apply=mask,rollout.stop_set=student",
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command. Its working directory is the project's; a module of the user's lies in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "ops.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )


@pytest.fixture
def katana(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`katana(*arguments)`: what the command prints. A module of the user's lies in `tmp_path`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the runs that a comparison starts
    monkeypatch.syspath_prepend(tmp_path)

    def command(*arguments: str) -> str:
        code = main([*arguments])
        told = capsys.readouterr()
        assert code == 0, told.out + told.err
        return told.out + told.err

    return command


def test_small_experiments_from_comparison_to_audit(tmp_path: Path, katana: Callable[..., str]) -> None:
    # The policy that docs/policies.md shows, as it stands there.
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.DOTALL)
    assert shown is not None
    (tmp_path / "my_policies.py").write_text(shown[1])
    katana("pretrain", "--exchange-end", "ops/models/student", "--out", str(tmp_path / "student"))
    settings = [flag for item in (f"runs_dir={tmp_path}", *SMALL) for flag in ("--set", item)]
    settings += ["--set", f"student.model={tmp_path / 'student'}"]
    rows = [flag for variant in VARIANTS for flag in ("--variant", variant)]
    grid = tmp_path / "grid"
    chosen = ["--name", "grid", "--policies", "kat,random_matched", "--seeds", "0", "--budget", f"tokens:{TOKENS}"]
    command = ("compare", str(DEMO), *settings, *chosen, *rows)

    interrupted = start(tmp_path, *command)
    wait_for_steps(grid / "kat-s0", 1, interrupted)
    interrupted.send_signal(signal.SIGINT)
    code, output = finish(interrupted, timeout_s=60)
    assert code == 130, output
    assert "Continue with the same command" in output
    assert not children_of(grid)
    assert not (grid / "kat-s0" / "summary.json").exists()
    assert not (grid / "random_matched-s0").exists()

    output = katana(*command)
    assert "kat-s0: resumes" in output and "random_matched-s0: starts" in output
    assert not children_of(grid)
    check_report(grid, output)

    written = (grid / "compare.html").read_bytes()
    assert "4 done already, 0 to do" in katana(*command)
    assert (grid / "compare.html").read_bytes() == written

    # Killed between the summary and the last evaluation: the run goes on, and evaluates what it ended with.
    evaluations = grid / "shadow-s0" / "eval.jsonl"
    before = evaluations.read_text().splitlines(keepends=True)
    evaluations.write_text("".join(before[:-1]) + before[-1][:40])  # a torn line behind
    output = katana(*command)
    assert "shadow-s0: resumes" in output
    after = [json.loads(line) for line in evaluations.read_text().splitlines()]
    assert [line["step"] for line in after] == [json.loads(line)["step"] for line in before]
    check_report(grid, output)

    for label in ("kat", "own"):  # one that was interrupted, one that was not
        check_budget(grid / f"{label}-s0")
        assert f"/ {TOKENS:,} tokens generated" in (grid / "logs" / f"{label}-s0.log").read_text()

    output = katana("replay", str(grid / "shadow-s0"), "--sweep", "termination.eta=0.3,0.6")
    recorded = re.search(r"([\d,]+) of ([\d,]+) recorded verdicts come out the same", output)
    assert recorded is not None and recorded[1] == recorded[2]
    assert (grid / "shadow-s0" / "replay" / "replay.csv").is_file()
    output = katana("audit", str(grid / "shadow-s0"), "--rollouts", "6", "--samples", "2")
    assert "recoverable" in output
    assert (grid / "shadow-s0" / "audit" / "audit.csv").is_file()


def check_report(grid: Path, output: str) -> None:
    assert "NOT DONE" not in output
    assert "## Was random_matched matched?" in output
    with (grid / "compare.csv").open() as file:
        cells = {row["row"]: row for row in csv.DictReader(file)}
    assert list(cells) == ["kat", "random_matched", "shadow", "own"]
    for label, row in cells.items():
        summary = json.loads((grid / f"{label}-s0" / "summary.json").read_text())
        last = read(grid / f"{label}-s0" / "eval.jsonl")[-1]
        assert (row["seed"], row["state"], row["steps"]) == ("0", "done", str(summary["steps"]))
        assert (float(row["avg_at_k"]), row["evaluated_step"]) == (last["avg@k"], row["steps"])
        assert int(row["tokens_generated"]) >= TOKENS
        assert int(row["tokens_generated"]) == sum(arm["tokens_generated"] for arm in summary["arms"].values())
        assert float(row["wall_s"]) > 0
    trained = {label: int(row["tokens_trained"]) / int(row["tokens_generated"]) for label, row in cells.items()}
    assert int(cells["kat"]["tokens_detection"]) > 0 and int(cells["own"]["tokens_detection"]) > 0
    assert int(cells["own"]["tokens_overshoot"]) > int(cells["kat"]["tokens_overshoot"])  # written to the end
    assert trained["own"] < trained["shadow"]
    assert (grid / "compare.md").read_text().split("\n![")[0].strip() in output
    assert "one seed: nothing to say" in output
    assert (grid / "compare.png").read_bytes().startswith(b"\x89PNG")


def check_budget(folder: Path) -> None:
    """`learner.max_generated_tokens`: the run ends with the step that finds its tokens spent, whole."""
    steps = read(folder / "metrics.jsonl")
    counts = [line["tokens_generated"] for line in steps]
    assert counts == sorted(counts)
    assert counts[-2] < TOKENS <= counts[-1]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    summary = check_books(folder, steps=len(steps))
    assert [line["step"] for line in summary["eval"]] == [0, len(steps)]
    assert json.loads((folder / "checkpoints" / f"step-{len(steps):08d}" / "state.json").read_text())
    assert (folder / "model" / "model.safetensors").exists()
    # The books have all that was counted, and what was written from the last step to the end.
    lines = read(folder / "rollouts.jsonl")
    assert counts[-1] <= sum(line["tokens_generated"] for line in lines) < counts[-1] + 10_000
    assert Counter(line["ending"] for line in lines)["dead"] == 0
    rates = [line["learning_rate"] for line in steps]
    assert all(rate > 0 for rate in rates)
    assert rates[-1] < max(rates) / 4, "the schedule did not follow the tokens"
