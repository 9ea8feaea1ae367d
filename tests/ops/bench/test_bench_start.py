"""The bench of a run's start, on a real run that is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_runs import DEMO, SMALL

from common.config import Config, load
from ops.bench.start import EVENTS, first_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def config(tmp_path: Path, *settings: str) -> Config:
    return load(DEMO, [f"runs_dir={tmp_path}", *SMALL, *settings])


def test_events_of_a_start_are_measured_in_their_order(tmp_path: Path) -> None:
    found = first_step(config(tmp_path), 1)
    assert found["roles"] == 6
    for event in EVENTS:
        assert found[event]["min"] == found[event]["median"] == found[event]["max"]
    weights, chunk, step = (found[event]["min"] for event in EVENTS[1:])
    assert 0 < weights < chunk < step
    assert found["roles_up_s"]["min"] > 0
    assert list(tmp_path.iterdir()) == []  # its runs are elsewhere, and gone


def test_a_run_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 2.*no-such-model"):
        first_step(config(tmp_path, "student.model=/no-such-model"), 1)
