"""summary.json: the results of a run, computed from its folder alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from common.files import write_text
from common.runfiles.names import SUMMARY
from common.runfiles.records import Summary
from common.runfiles.run import RunFolder
from ops.stats import endings
from ops.stats.rewards import rewards_of
from ops.stats.saving import ARMS, arm_totals, length_saving
from ops.stats.teachers import by_teacher


def summarize(folder: Path) -> Summary:
    """The summary of a run's folder, in any state of the run. Raises ConfigError for a damaged file."""
    run = RunFolder(folder)
    lines = list(run.rollouts())
    last = [None, *run.steps()][-1]
    return Summary(
        steps=last.step if last else 0,
        policy_version=last.policy_version if last else 0,
        wall_s=run.wall_s,
        arms={arm: arm_totals(lines, arm) for arm in ARMS},
        length_saving=length_saving(lines),
        endings=endings.by_ending(lines),
        rewards=rewards_of(run, lines),
        teachers=by_teacher(lines),
        finish_reasons=dict(sorted(Counter(line.finish_reason for line in lines).items())),
        evaluations=sorted(run.evaluations(), key=lambda one: one.policy_version),
        ledger=run.ledger,
    )


def write_summary(folder: Path) -> Summary:
    """Compute the summary and write it to the folder."""
    summary = summarize(folder)
    tree = summary.to_json() | {"endings": endings.to_json(summary.endings)}
    write_text(folder / SUMMARY, json.dumps(tree, indent=2, allow_nan=False) + "\n")
    return summary
