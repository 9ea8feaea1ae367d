"""The real processes: `katana run` on the shipped models, to its end, interrupted, and with roles killed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.termination import kat_verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DEMO = Path(__file__).parents[2] / "ops" / "experiments" / "demo.yaml"
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
) -> subprocess.Popen[str]:
    config = str(folder / name / "config.yaml") if "--resume" in arguments else str(DEMO)
    overrides = () if "--resume" in arguments else (f"runs_dir={folder}", *settings)
    flags = [flag for item in overrides for flag in ("--set", item)]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ops.cli",
            "run",
            config,
            *flags,
            *([] if "--resume" in arguments else ["--name", name]),
            *arguments,
        ],
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


def check_verdicts(folder: Path) -> int:
    """Each verdict equals the rule replayed offline on the recorded divergences; returns the number of cuts."""
    cuts = 0
    for trace in read(folder / "traces.jsonl"):
        divergence = np.frombuffer(base64.b64decode(trace["divergence"]), dtype="<f4")
        trigger, keep, _ = kat_verdict(divergence, window=16, patience=4, threshold=trace["threshold"])
        total = len(divergence)
        assert (trace["trigger"], trace["keep"]) == ((total, total) if trigger is None else (trigger, keep))
        assert trace["cut"] == (trigger is not None and trace["arm"] == "treated")
        cuts += trace["cut"]
    return cuts


def test_a_run_trains_cuts_evaluates_and_closes_its_ledger(tmp_path: Path) -> None:
    settings = (
        *SMALL,
        "termination.window=16",
        "termination.patience=4",
        "termination.grace_tokens=0",
        "termination.stride=1",
    )
    code, output = finish(start(tmp_path, settings=settings))
    assert code == 0, output
    folder = tmp_path / "e2e"
    summary = check_books(folder, steps=6)
    assert check_verdicts(folder) > 0
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert set(summary) >= {
        "steps",
        "policy_version",
        "wall_s",
        "arms",
        "length_saving",
        "finish_reasons",
        "eval",
        "ledger",
    }
    assert set(summary["arms"]) == {"treated", "control"}
    assert set(summary["length_saving"]) == {"ratio", "low", "high"}
    assert sum(summary["finish_reasons"].values()) == summary["ledger"]["admitted"]
    assert [line["policy_version"] for line in summary["eval"]] == [0, 3, 6]
    assert all({"k", "n", "avg@k", "pass@k", "mean_length"} <= set(line) for line in summary["eval"])
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "ledger: admitted" in output
    assert not children_of(folder), "a process was left behind"
    assert len(list((folder / "weights").glob("*.safetensors"))) == 6  # max_staleness + 2
    assert len(list((folder / "checkpoints").iterdir())) == 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = tokenizer("1+2?", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()

    # The folder exists: the same command refuses, --fresh moves it aside.
    code, output = finish(start(tmp_path))
    assert code == 2
    assert "exists already" in output


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "e2e"
    process = start(tmp_path)
    wait_for_steps(folder, 2, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    assert time.monotonic() - began < 20
    assert not children_of(folder), "a process was left behind"
    code, output = finish(start(tmp_path, "--resume", "--set", "learner.batch_size=8"))
    assert code == 2
    assert "learner.batch_size" in output
    code, output = finish(start(tmp_path, "--resume"))
    assert code == 0, output
    check_books(folder, steps=6)
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    versions = [line["policy_version"] for line in read(folder / "metrics.jsonl")]
    assert versions == sorted(versions)


def test_every_role_killed_and_told_to_stop_once_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "e2e"
    settings = (*SMALL, "learner.max_steps=16", "eval.every_steps=0", "liveness.claim_s=3", "liveness.heartbeat_s=0.5")
    process = start(tmp_path, settings=settings)
    faults = [(role, signal.SIGKILL) for role in ("rollout", "teacher", "arbiter", "feeder", "learner")]
    faults += [(role, signal.SIGTERM) for role in ("learner", "rollout")]
    for step, (role, number) in enumerate(faults, start=2):
        wait_for_steps(folder, step, process)
        pid = children_of(folder).get(role)
        assert pid is not None, f"{role} is not running"
        os.kill(pid, number)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("; restarted") >= 7
    check_books(folder, steps=16)


def test_a_lost_redis_and_a_torn_checkpoint_are_survived_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "e2e"
    settings = (*SMALL, "learner.max_steps=10", "eval.every_steps=0")
    process = start(tmp_path, settings=settings)
    wait_for_steps(folder, 6, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    booked = len(read(folder / "rollouts.jsonl"))
    shutil.rmtree(folder / "redis")
    newest = max((folder / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"torn")
    code, output = finish(start(tmp_path, "--resume"))
    assert code == 0, output
    summary, lines = json.loads((folder / "summary.json").read_text()), read(folder / "rollouts.jsonl")
    ledger = summary["ledger"]
    assert summary["steps"] == 10
    assert ledger["open"] == 0
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["dead"] == len(lines)
    assert len({line["rid"] for line in lines}) == len(lines) > booked
    assert ledger["dropped"]["lost"] == sum(line["reason"] == "lost" for line in lines) > 0
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == list(range(1, 11))
    assert newest.with_name(f"{newest.name}.torn").exists()
    assert "Redis lost this run" in (folder / "logs" / "feeder.log").read_text()
    assert "torn checkpoint skipped" in (folder / "logs" / "learner.log").read_text()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_no_worker_can_load_ends_the_run_with_its_reason(tmp_path: Path, who: str) -> None:
    model = tmp_path / who
    shutil.copytree(DEMO.parents[1] / "models" / who, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    code, output = finish(start(tmp_path, settings=(*SMALL, f"{who}.model={model}")), timeout_s=90)
    assert code == 2
    assert "cannot be loaded" in output
    assert str(model) in output
    assert "exited with 0" not in output
    assert "--resume" not in output  # it could not go on
    log = (tmp_path / "e2e" / "logs" / ("teacher-0.log" if who == "teacher" else "learner.log")).read_text()
    assert "succeeded" not in log
    assert not children_of(tmp_path / "e2e"), "a process was left behind"


def test_a_worker_that_fails_slowly_is_given_up_with_its_last_error(tmp_path: Path) -> None:
    """Each failure takes longer than a fifth of a minute would allow: what counts is that it makes no progress."""
    shim = """
import os, sys, time
if "ops.cli" in " ".join(sys.orig_argv) and "teacher" in sys.orig_argv:
    time.sleep(4); print("error: out of memory", file=sys.stderr, flush=True); os._exit(1)
"""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(shim)
    code, output = finish(start(tmp_path, environment={"PYTHONPATH": str(tmp_path / "shim")}), timeout_s=120)
    assert code == 1, output
    assert output.count("teacher-0 exited with 1; restarted (error: out of memory") == 5
    assert "teacher-0 failed 6 times in a row without progress: error: out of memory" in output
    assert not children_of(tmp_path / "e2e"), "a process was left behind"
