"""The real processes: `katana run` on the shipped models, to its end, interrupted, and where it cannot go on."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from real_runs import DEMO, SMALL, check_books, children_of, finish, read, start, wait_for_steps
from whole_run import EVALUATED_EVERY, NAME, STEPS, WholeRun

from common.termination import kat_verdict
from ops.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


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


@pytest.mark.xdist_group("whole run")
def test_a_run_trains_cuts_evaluates_and_closes_its_ledger(whole_run: WholeRun) -> None:
    folder = whole_run.folder
    summary = check_books(folder, steps=STEPS)
    assert check_verdicts(folder) > 0
    assert [line["step"] for line in read(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
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
    assert [line["policy_version"] for line in summary["eval"]] == list(range(0, STEPS + 1, EVALUATED_EVERY))
    assert all({"k", "n", "avg@k", "pass@k", "mean_length"} <= set(line) for line in summary["eval"])
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "ledger: admitted" in whole_run.output
    assert not children_of(folder), "a process was left behind"
    assert len(list((folder / "weights").glob("*.safetensors"))) == 6  # max_staleness + 2
    assert len(list((folder / "checkpoints").iterdir())) == 2

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = tokenizer("1+2?", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.xdist_group("whole run")
def test_a_folder_that_exists_is_not_written_over(whole_run: WholeRun) -> None:
    code, output = finish(start(whole_run.folder.parent, name=NAME))
    assert code == 2
    assert "exists already" in output


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
if "ops.cli" in " ".join(sys.orig_argv) and "teacher" in sys.orig_argv:
    time.sleep(4); print("error: out of memory", file=sys.stderr, flush=True); os._exit(1)
"""
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(shim)
    settings, environment = (*SMALL, "eval.every_steps=0"), {"PYTHONPATH": str(tmp_path / "shim")}
    code, output = finish(start(tmp_path, settings=settings, environment=environment), timeout_s=120)
    assert code == 1, output
    assert output.count("teacher-0 exited with 1; restarted (error: out of memory") == 5
    assert "teacher-0 failed 6 times in a row without progress: error: out of memory" in output
    assert not children_of(tmp_path / "e2e"), "a process was left behind"
