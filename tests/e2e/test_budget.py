"""`learner.max_generated_tokens`, with real processes: the run ends near its budget, whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_run import SMALL, check_books, finish, read, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
BUDGET = 12_000


def test_a_run_ends_with_the_step_that_finds_its_tokens_spent(tmp_path: Path) -> None:
    settings = (*SMALL, "learner.max_steps=1000", f"learner.max_generated_tokens={BUDGET}", "eval.every_steps=100")
    code, output = finish(start(tmp_path, name="budget", settings=settings), timeout_s=380)
    assert code == 0, output
    folder = tmp_path / "budget"
    steps = read(folder / "metrics.jsonl")
    counts = [line["tokens_generated"] for line in steps]
    assert counts == sorted(counts)
    assert counts[-2] < BUDGET <= counts[-1]

    summary = check_books(folder, steps=len(steps))
    assert [line["step"] for line in summary["eval"]] == [0, len(steps)]
    assert json.loads((folder / "checkpoints" / f"step-{len(steps):08d}" / "state.json").read_text())
    assert (folder / "model" / "model.safetensors").exists()
    # The books have all that was counted, and what was written from the last step to the end.
    booked = sum(line["tokens_generated"] for line in read(folder / "rollouts.jsonl"))
    assert counts[-1] <= booked < counts[-1] + 10_000
    assert Counter(line["ending"] for line in read(folder / "rollouts.jsonl"))["dead"] == 0

    rates = [line["learning_rate"] for line in steps]
    assert all(rate > 0 for rate in rates)
    assert rates[-1] < max(rates) / 4, "the schedule did not follow the tokens"
    assert f"/ {BUDGET:,} tokens generated" in output
