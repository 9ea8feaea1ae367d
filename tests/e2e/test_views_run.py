"""Real runs whose policy reads the view of a token: their verdicts come out the same from the record."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from real_runs import check_books, finish, start

from common.runfiles.run import RunFolder
from ops.chaos.checker import check_folder
from ops.replay.command import replay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = (
    "learner.batch_size=16",
    "learner.max_steps=4",
    "rollout.slots=16",
    "termination.control_fraction=0.4",
    "termination.min_calibration=8",
    "termination.warmup_steps=1",
    "checkpoints.every_steps=4",
    "eval.every_steps=0",
    "loss.weighting=entropy",
    "feeder.record_audit=true",
)
POLICIES = {
    "entropy": ("termination.eta=0.3",),
    "margin_change": ("termination.margin_drift=0.05", "termination.margin_threshold=1", "termination.apply=mask"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_by_a_policy_that_reads_views_is_replayed_verdict_by_verdict(tmp_path: Path, policy: str) -> None:
    code, output = finish(start(tmp_path, settings=(*SMALL, f"termination.policy={policy}", *POLICIES[policy])))
    assert code == 0, output
    folder = tmp_path / "e2e"
    check_books(folder, 4)
    assert check_folder(folder) == []
    traces = list(RunFolder(folder).traces())
    fired = [trace for trace in traces if trace.fired]
    assert fired and {trace.finish_reason for trace in fired if trace.stopped} <= {"low_entropy"}
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
    count = len(traces)
    assert re.search(rf"{count} of {count} recorded verdicts", text), text
