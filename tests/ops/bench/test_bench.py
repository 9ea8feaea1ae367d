"""What the benches say, on something small."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import make_config

from ops.bench import speed as bench


def test_a_head_is_measured_both_ways_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_HEAD", (16, 40))
    found = bench.head(make_config(tmp_path), 2)
    assert (found["hidden_size"], found["vocab_size"]) == (16, 40)
    assert list(found["rows"]) == [1, 8, 32, 256]
    for row in found["rows"].values():
        assert all(0 < one["min"] <= one["median"] <= one["max"] for one in row.values())
        assert row.keys() == {"bfloat16", "float32", "ratio"}
