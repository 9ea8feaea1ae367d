"""`katana run` on the shipped models, to its end: what a run of real processes leaves behind."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from real_runs import DEMO, check_books, children_of, read
from whole_run import EVALUATED_EVERY, NAME, STEPS, WholeRun

from common.runfiles.tracing import read_traces
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


def test_a_folder_that_exists_is_not_written_over(whole_run: WholeRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_run.folder.rglob("*")}
    assert main(["run", str(DEMO), "--set", f"runs_dir={whole_run.folder.parent}", "--name", NAME]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole_run.folder.rglob("*")} == before


def test_no_process_of_a_run_unpickles_anything(whole_run: WholeRun) -> None:
    lines = whole_run.unpickled
    print(Counter(tuple(line[:3]) for line in lines))
    started = {line[1] for line in lines if line[0] == "started" and len(line) > 1}
    assert {"run", "feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"} <= started
    assert [line for line in lines if line[0] != "started"] == []


def test_the_trace_has_every_role_with_spans_that_nest(whole_run: WholeRun, tmp_path: Path) -> None:
    found = {one.process.role: one for one in read_traces(whole_run.folder)}
    assert set(found) == {"feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"}
    wanted = {
        "feeder": {"admitting", "booking"},
        "rollout": {"an engine step", "prefill", "exchange", "swapping weights"},
        "teacher": {"scoring", "a forward"},
        "arbiter": {"judging"},
        "learner": {
            *("waiting for a batch", "step", "a micro-batch", "the optimizer's step"),
            *("publishing weights", "a checkpoint"),
        },
        "evaluator": {"evaluating"},
    }
    for role, one in found.items():
        assert wanted[role] <= {span.span for span in one.spans}, role
        assert not (one.damaged or one.full)
        opened: list[int] = []  # ends of the spans around
        for span in one.spans:
            while opened and opened[-1] <= span.at_us:
                opened.pop()
            assert not opened or span.end_us <= opened[-1], (role, span)
            opened.append(span.end_us)
    steps = [span.facts["step"] for span in found["learner"].spans if span.span == "step"]
    assert steps == list(range(1, STEPS + 1))
    written = sum(span.facts["tokens"] for span in found["rollout"].spans if span.span == "an engine step")
    assert written >= sum(line["tokens_generated"] for line in read(whole_run.folder / "rollouts.jsonl"))

    stages: dict[str, list[tuple[int, str]]] = {}
    for one in found.values():
        for stage in one.stages:
            stages.setdefault(stage.rid, []).append((stage.at_us, stage.stage))
    booked = {line["rid"]: line for line in read(whole_run.folder / "rollouts.jsonl")}
    assert set(stages) == set(booked)
    for rid, line in booked.items():
        if line["ending"] == "trained":
            order = list(
                dict.fromkeys(stage for _, stage in sorted(stages[rid]) if stage not in ("chunk", "scored", "seen"))
            )
            assert order == ["admitted", "taken", "verdict", "trained", "booked"]
            assert {"chunk", "scored"} <= {stage for _, stage in stages[rid]}
    assert main(["trace", str(whole_run.folder), "--out", str(tmp_path / "trace.json")]) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(found) + sum(len(one.spans) for one in found.values())
