"""Runs with real processes: started, waited for, ended; and what must hold of their books."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.runfiles.run import RunFolder
from ops.replay.command import replay

DEMO = Path(__file__).parents[1] / "ops" / "experiments" / "demo.yaml"
TEACHERS = DEMO.with_name("demo-teachers.yaml")
SMALL = (
    "learner.batch_size=16",
    "learner.max_steps=6",
    "rollout.slots=16",
    "termination.min_calibration=16",
    "termination.warmup_steps=1",
    "checkpoints.every_steps=2",
    "eval.problems=8",
    "eval.k=2",
    "eval.every_steps=3",
)


def start(
    folder: Path,
    *arguments: str,
    name: str = "e2e",
    settings: tuple[str, ...] = SMALL,
    environment: dict[str, str] | None = None,
    config: Path = DEMO,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ops.cli", "run"]
    if "--resume" in arguments:
        command += [str(folder / name / "config.yaml"), *arguments]
    else:
        sets = [flag for item in (f"runs_dir={folder}", *settings) for flag in ("--set", item)]
        command += [str(config), *sets, "--name", name, *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=DEMO.parents[2],
        env=os.environ | (environment or {}),
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"the run did not end:\n{output}")
    return process.returncode, output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def children_of(folder: Path) -> dict[str, int]:
    """Role → pid of the processes that work in a run's folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any(str(folder) in word for word in words) and "ops.cli" in words and "run" not in words:
                found[words[words.index("ops.cli") + 1]] = int(entry.name)
    return found


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(read(folder / "metrics.jsonl")) >= steps:
            return
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"no {steps} steps within {timeout_s} s")


def check_books(folder: Path, steps: int) -> dict[str, Any]:
    """Every admitted rollout ended exactly once, as trained, dropped (with a reason) or dead; and the books agree."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    config = (folder / "config.yaml").read_text()
    batch = int(re.search(r"batch_size: (\d+)", config).group(1))  # type: ignore[union-attr]
    ledger, lines = summary["ledger"], read(folder / "rollouts.jsonl")
    assert summary["steps"] == steps
    assert ledger["open"] == 0
    assert ledger["dead"] == 0
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values()) == len(lines)
    assert set(ledger["dropped"]) <= {"stale", "empty", "run_end"}
    assert len({line["rid"] for line in lines}) == len(lines)
    endings = Counter(line["ending"] for line in lines)
    assert endings["trained"] == ledger["trained"] == steps * batch
    for line in lines:
        parts = line["tokens_kept"] + line["tokens_detection"] + line["tokens_overshoot"]
        assert line["tokens_generated"] == parts, line
        assert line["tokens_trained"] == (line["tokens_kept"] if line["ending"] == "trained" else 0)
    return summary


def check_views(folder: Path, *, stopped_by: str | None) -> None:
    """Every trace has its view, the policy fired on some, and all verdicts come out the same from the record. Those
    that it stopped have this finish reason; None: it stopped nobody."""
    traces = list(RunFolder(folder).traces())
    fired = [trace for trace in traces if trace.fired]
    assert fired and {trace.finish_reason for trace in fired if trace.stopped} == ({stopped_by} - {None})
    for trace in traces:
        assert trace.view is not None
        entropy, student, teacher = trace.view
        assert entropy.min() >= 0 and entropy.max() < np.log(38)  # outcomes of the shipped vocabulary
        assert student.max() <= 1e-3 and teacher.max() <= 1e-3
    # The divergence is the mean of student - teacher over what could have been sampled: near that over what was.
    both = np.concatenate([trace.view for trace in traces if trace.view is not None], axis=1)
    divergence = np.concatenate([trace.divergence for trace in traces])
    assert (both[1] - both[2]).mean() == pytest.approx(divergence.mean(), rel=0.3)
    text = replay(folder, sweeps=["termination.policy=kat,entropy,margin_change,adaptive,repetition"])
    assert re.search(rf"{len(traces)} of {len(traces)} recorded verdicts", text), text
