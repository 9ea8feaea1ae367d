"""Benchmarks: a line of eval.jsonl has each of them, and their means on its top level."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import put_rows, put_tiny_qwen3
from samples import make_config

from common.config import Config, ConfigError
from common.files import sha256_of
from common.runfiles.records import Scores
from ops.report.run import read_run
from ops.run.evaluator import Evaluator, _judged, _Sample, _scores, follow


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = {"model": str(put_tiny_qwen3(tmp_path / "tiny"))}
    train = put_rows(tmp_path / "train", [{"prompt": "p", "answer": "1"}], "jsonl")
    short = put_rows(tmp_path / "short", [{"q": "a", "answer": "1"}, {"q": "b", "answer": "2"}], "jsonl")
    long = put_rows(tmp_path / "long", [{"prompt": "c" * 30, "answer": "1"}] * 3, "jsonl")
    return make_config(
        tmp_path / "runs",
        student=model,
        teacher=model,
        rollout={"max_completion_length": 12},
        data={"task": "dataset", "path": str(train), "verifier": "exact"},
        eval={
            "every_steps": 1,
            "k": 2,
            "slots": 4,
            "data": {
                "short": {"path": str(short), "prompt_key": "q", "k": 3},
                "long": {"path": str(long), "problems": 1},
            },
        },
    )


def test_the_line_holds_each_benchmark_and_their_means() -> None:
    parts = {"a": Scores(8, 10, 0.5, 0.9, 20.0, 1.0), "b": Scores(32, 30, 0.1, 0.3, 40.0, 0.5)}
    line = Scores(8, 40, 0.3, 0.6, 30.0, 0.75, benchmarks=parts).to_json()
    assert (line["avg@k"], line["n"], line["benchmarks"]["b"]["k"]) == (0.3, 40, 32)
    assert "benchmarks" not in parts["a"].to_json()


def test_a_sample_that_could_not_be_judged_is_not_a_wrong_answer() -> None:
    def sample(problem: int, correct: bool | None) -> _Sample:
        return _Sample(problem, 10, True, correct)

    samples = [sample(0, True), sample(0, False), sample(1, True), sample(1, None), sample(2, True), sample(2, True)]
    scores = _scores(samples, 3, 2)
    assert (scores.n, scores.avg_at_k, scores.pass_at_k, scores.unjudged) == (2, 0.75, 1.0, 1)
    assert scores.to_json()["unjudged"] == 1
    assert "unjudged" not in _scores(samples[:2], 1, 2).to_json()
    with pytest.raises(ConfigError, match="gave no verdict on 1 of 2 samples"):
        _scores([sample(0, None), sample(0, True)], 1, 2)


def test_a_missing_verdict_is_asked_for_once_more() -> None:
    class Source:
        def __init__(self, *verdicts: bool | None) -> None:
            self.verdicts = list(verdicts)

        def judge(self, problem: int, tokens: Any) -> bool | None:
            return self.verdicts.pop(0)

    for verdicts, correct in [((None, True), True), ((None, False), False), ((None, None), None), ((False,), False)]:
        source: Any = Source(*verdicts)
        assert _judged(source, "4:1", np.zeros(3, np.int32), True) == _Sample(4, 3, True, correct)
        assert source.verdicts == []


@pytest.mark.slow
def test_every_benchmark_is_measured_with_its_own_k(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[int, bool]] = []
    evaluator = Evaluator(config)

    def right(problem: int, tokens: Any) -> bool:
        judged.append((problem, True))
        return problem == 0

    for one in evaluator._problems:
        monkeypatch.setattr(one.source, "judge", right)
    scores = evaluator.measure()
    assert scores is not None
    short, long = scores.benchmarks["short"], scores.benchmarks["long"]
    assert (short.n, short.k, short.avg_at_k, short.pass_at_k) == (2, 3, 0.5, 0.5)
    assert (long.n, long.k, long.avg_at_k) == (1, 2, 1.0)
    assert (scores.n, scores.k, scores.avg_at_k, scores.pass_at_k) == (3, 2, 0.75, 0.75)
    assert len(judged) == 2 * 3 + 1 * 2
    again = evaluator.measure(k=1)
    assert again is not None
    assert {one.k for one in again.benchmarks.values()} == {again.k} == {1}
    stop = threading.Event()
    stop.set()
    assert evaluator.measure(stop=stop) is None


@pytest.mark.slow
def test_each_version_has_one_line_that_the_report_reads(config: Config) -> None:
    folder = config.run_dir / "eval"
    folder.mkdir(parents=True)
    weights = folder / "v00000001.safetensors"
    weights.write_bytes((Path(config.student.model) / "model.safetensors").read_bytes())
    note = {"version": 1, "step": 1, "tokens_trained": 5, "sha256": sha256_of(weights)}
    (folder / "v00000001.json").write_text(json.dumps(note))
    follow(config, threading.Event(), lambda: True)
    (line,) = [json.loads(text) for text in (config.run_dir / "eval.jsonl").read_text().splitlines()]
    assert set(line["benchmarks"]) == {"short", "long"}
    assert line["mean_length"] == pytest.approx(sum(one["mean_length"] for one in line["benchmarks"].values()) / 2)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    for name in ("metrics.jsonl", "rollouts.jsonl", "traces.jsonl"):
        (config.run_dir / name).write_text("")
    assert [one.step for one in read_run(config.run_dir).evaluations] == [1]


@pytest.mark.slow
def test_nothing_is_evaluated_before_the_first_step(config: Config) -> None:
    note = config.run_dir / "eval" / "v00000000.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"version": 0, "step": 0, "tokens_trained": 0, "sha256": "0"}))
    stop, asked = threading.Event(), 0

    def begun() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            stop.set()
        return False

    follow(config, stop, lambda: False, begun)
    assert asked == 3 and note.exists()
    follow(
        config, threading.Event(), lambda: True, begun
    )  # a run that has ended without a step is evaluated all the same
    assert asked == 3 and not note.exists()


def test_a_data_set_without_benchmarks_cannot_be_evaluated(config: Config) -> None:
    bare = config.model_copy(update={"eval": config.eval.model_copy(update={"data": {}})})
    with pytest.raises(ConfigError, match=r"eval.data: names no benchmark"):
        Evaluator(bare)
