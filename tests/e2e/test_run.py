"""The real processes: `katana run` interrupted, robbed of its Redis, and where it cannot go on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_runs import DEMO, SMALL, children_of, finish, read, start, wait_for_steps

from ops.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_run_is_interrupted_and_survives_a_lost_redis_and_a_torn_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e2e"
    settings = (*SMALL, "learner.max_steps=6", "eval.every_steps=0")
    process = start(tmp_path, settings=settings)
    wait_for_steps(folder, 3, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=40)
    assert code == 130, output
    assert time.monotonic() - began < 20
    assert not children_of(folder), "a process was left behind"
    assert main(["run", str(folder / "config.yaml"), "--resume", "--set", "learner.batch_size=8"]) == 2
    assert "learner.batch_size" in capsys.readouterr().err

    booked = len(read(folder / "rollouts.jsonl"))
    shutil.rmtree(folder / "redis")
    newest = max((folder / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"torn")
    code, output = finish(start(tmp_path, "--resume"))
    assert code == 0, output
    summary, lines = json.loads((folder / "summary.json").read_text()), read(folder / "rollouts.jsonl")
    ledger = summary["ledger"]
    assert summary["steps"] == 6
    assert ledger["open"] == 0
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["dead"] == len(lines)
    assert len({line["rid"] for line in lines}) == len(lines) > booked
    assert ledger["dropped"]["lost"] == sum(line["reason"] == "lost" for line in lines) > 0
    steps = read(folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    versions = [line["policy_version"] for line in steps]
    assert versions == sorted(versions)
    assert newest.with_name(f"{newest.name}.torn").exists()
    assert "Redis lost this run" in (folder / "logs" / "feeder.log").read_text()
    assert "torn checkpoint skipped" in (folder / "logs" / "learner.log").read_text()


def test_without_a_nursery_each_role_is_a_process_that_imports_for_itself(tmp_path: Path) -> None:
    """As elsewhere than on Linux."""
    settings = [f"runs_dir={tmp_path}", *SMALL, "learner.max_steps=2", "eval.every_steps=0"]
    code = f"""
import sys
from pathlib import Path
from common.config import load
from ops.run.local import run_locally
sys.exit(run_locally(load(Path({str(DEMO)!r}), {settings!r}), None, resume=False, fresh=False))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=DEMO.parents[2], timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "demo"
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert not children_of(folder), "a process was left behind"


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_no_worker_can_load_ends_the_run_with_its_reason(tmp_path: Path, who: str) -> None:
    model = tmp_path / who
    shutil.copytree(DEMO.parents[1] / "models" / who, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    code, output = finish(
        start(tmp_path, settings=(*SMALL, "eval.every_steps=0", f"{who}.model={model}")), timeout_s=90
    )
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
class Failing:
    def find_spec(self, name, path=None, target=None):
        if name == "actors.app" and "teacher" in sys.argv:
            time.sleep(4); print("error: out of memory", file=sys.stderr, flush=True); os._exit(1)
sys.meta_path.insert(0, Failing())
"""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(shim)
    settings, environment = (*SMALL, "eval.every_steps=0"), {"PYTHONPATH": str(tmp_path / "shim")}
    code, output = finish(start(tmp_path, settings=settings, environment=environment), timeout_s=120)
    assert code == 1, output
    assert output.count("teacher-0 exited with 1; restarted (error: out of memory") == 5
    assert "teacher-0 failed 6 times in a row without progress: error: out of memory" in output
    assert not children_of(tmp_path / "e2e"), "a process was left behind"
