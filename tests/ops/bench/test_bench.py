"""What the benches say, on something small."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import make_config

from ops.bench import speed as bench
from ops.bench.score import score


def test_a_head_is_measured_both_ways_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_HEAD", (16, 40))
    found = bench.head(make_config(tmp_path), 2)
    assert (found["hidden_size"], found["vocab_size"]) == (16, 40)
    assert list(found["rows"]) == [1, 8, 32, 256]
    for row in found["rows"].values():
        assert all(0 < one["min"] <= one["median"] <= one["max"] for one in row.values())
        assert row.keys() == {"bfloat16", "float32", "ratio"}


def test_a_teacher_is_measured_by_rollouts_in_flight(tmp_path: Path) -> None:
    models = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher", "slots": 4}}
    config = make_config(tmp_path, **models, rollout={"max_completion_length": 24, "chunk_tokens": 4})
    found = score(config, 1)
    assert list(found["rollouts_in_flight"]) == [4, 5, 8]
    again = {
        (count, name): row["forwarded_again_per_token"]["median"]
        for count, rows in found["rollouts_in_flight"].items()
        for name, row in rows.items()
    }
    assert again[4, "fixed"] == again[4, "growing"] == 0.0
    assert again[8, "growing"] < again[8, "fixed"] and again[8, "fixed"] > 1.0
