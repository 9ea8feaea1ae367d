"""`katana compare` with real runs: interrupted by Ctrl-C, the same command again goes on, and reports."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[2] / "ops" / "experiments" / "demo.yaml"
STEPS = 8
SMALL = (
    "learner.batch_size=16",
    f"learner.max_steps={STEPS}",
    "rollout.slots=16",
    "termination.min_calibration=16",
    "termination.warmup_steps=1",
    "checkpoints.every_steps=1",
    "eval.problems=8",
    "eval.k=2",
    "eval.every_steps=4",
)


def start(folder: Path) -> subprocess.Popen[str]:
    settings = [flag for item in (f"runs_dir={folder}", *SMALL) for flag in ("--set", item)]
    grid = ["--policies", "none,kat", "--seeds", "3", "--name", "grid"]
    return subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "compare", str(DEMO), *settings, *grid],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=DEMO.parents[2],
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"the comparison did not end:\n{output}")
    return process.returncode, output


def wait_for_step(path: Path, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    process.terminate()
    pytest.fail(f"no step within {timeout_s} s:\n{process.communicate(timeout=60)[0]}")


def at_work_in(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(folder) in words:
                found.append(words)
    return found


def test_an_interrupted_comparison_goes_on_and_reports(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    process = start(tmp_path)
    wait_for_step(grid / "none-s3" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=60)
    assert code == 130, output
    assert "Continue with the same command" in output
    assert not at_work_in(grid)
    assert not (grid / "none-s3" / "summary.json").exists()
    assert not (grid / "kat-s3").exists()

    code, output = finish(start(tmp_path))
    assert code == 0, output
    assert "none-s3: resumes" in output and "kat-s3: starts" in output
    assert not at_work_in(grid)
    check_report(grid, output)

    written = (grid / "compare.html").read_bytes()
    code, output = finish(start(tmp_path))
    assert (code, "2 done already, 0 to do" in output) == (0, True), output
    assert (grid / "compare.html").read_bytes() == written

    # Killed between the summary and the last evaluation: the run goes on, and evaluates what it ended with.
    evaluations = grid / "kat-s3" / "eval.jsonl"
    before = evaluations.read_text().splitlines(keepends=True)
    evaluations.write_text("".join(before[:-1]) + before[-1][:40])  # a torn line behind
    code, output = finish(start(tmp_path))
    assert (code, "kat-s3: resumes" in output) == (0, True), output
    assert "NOT DONE" not in output
    after = [json.loads(line) for line in evaluations.read_text().splitlines()]
    assert [line["step"] for line in after] == [json.loads(line)["step"] for line in before]
    check_report(grid, output)


def check_report(grid: Path, output: str) -> None:
    with (grid / "compare.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["none", "kat"]
    for label, row in rows.items():
        summary = json.loads((grid / f"{label}-s3" / "summary.json").read_text())
        last = json.loads((grid / f"{label}-s3" / "eval.jsonl").read_text().splitlines()[-1])
        assert (row["seed"], row["state"], row["steps"]) == ("3", "done", str(STEPS))
        assert (float(row["avg_at_k"]), row["evaluated_step"]) == (last["avg@k"], str(STEPS))
        assert int(row["tokens_generated"]) == sum(arm["tokens_generated"] for arm in summary["arms"].values())
        assert float(row["wall_s"]) > 0
    assert (grid / "compare.md").read_text().split("\n![")[0].strip() in output
    assert "one seed: nothing to say" in output
    assert (grid / "compare.png").read_bytes().startswith(b"\x89PNG")
