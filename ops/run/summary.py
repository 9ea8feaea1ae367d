"""summary.json: what a run came to, made from its folder alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.files import write_text
from common.runfiles.lines import read_lines
from common.runfiles.records import EVALUATIONS, LEDGER, METRICS, ROLLOUTS, SUMMARY, WALL, BookLine
from ops.stats import endings
from ops.stats.saving import ARMS, arm_totals, length_saving


def summarize(folder: Path) -> dict[str, Any]:
    """The summary of a run's folder, whatever state the run is in."""
    lines = list(read_lines(folder / ROLLOUTS, BookLine.from_json))
    steps = list(read_lines(folder / METRICS))
    evaluations = list(read_lines(folder / EVALUATIONS))
    ledger_file = folder / LEDGER
    ledger = json.loads(ledger_file.read_text()) if ledger_file.exists() else {}
    saving = length_saving(lines)
    wall_file = folder / WALL
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "policy_version": steps[-1]["policy_version"] if steps else 0,
        "wall_s": json.loads(wall_file.read_text())["wall_s"] if wall_file.exists() else None,
        "arms": {arm: arm_totals(lines, arm) for arm in ARMS},
        "length_saving": {"ratio": saving.ratio, "low": saving.low, "high": saving.high},
        "endings": endings.to_json(endings.by_ending(lines)),
        "finish_reasons": dict(sorted(Counter(line.finish_reason for line in lines).items())),
        "eval": sorted(evaluations, key=lambda line: line["policy_version"]),
        "ledger": ledger,
    }


def write_summary(folder: Path) -> dict[str, Any]:
    """Make the summary and put it into the folder."""
    summary = summarize(folder)
    write_text(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary
