"""summary.json: totals and savings by hand, from a run's folder alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_folders
from run_folders import evaluation, step_line

from common.runfiles.records import ArmTotals, BookLine
from common.runfiles.run import RunFolder
from ops.run.summary import summarize, write_summary
from ops.stats.saving import arm_totals, length_saving


def line(arm: str, generated: int, **changes: Any) -> BookLine:
    kept = {"tokens_kept": generated - 3, "tokens_trained": generated - 3, "tokens_detection": 2, "tokens_overshoot": 1}
    return run_folders.booked(rid="r", arm=arm, tokens_generated=generated, **(kept | changes))


def test_the_saving_by_hand() -> None:
    """Treated 30, 50, mean 40; control 100, 60, mean 80: half is saved."""
    lines = [line("treated", 30), line("treated", 50), line("control", 100), line("control", 60)]
    saving = length_saving(lines)
    assert saving.ratio == 0.5
    # One prompt: every resample is the sample.
    assert (saving.low, saving.high) == (0.5, 0.5)


def test_what_the_policy_could_not_cut_or_the_run_ended_does_not_count() -> None:
    lines = [
        line("treated", 40),
        line("control", 80),
        line("treated", 9000, active=False),
        line("treated", 9000, ending="dropped", reason="run_end"),
        line("control", 9000, ending="dropped", reason="lost"),
        line("control", 9000, ending="dead", reason="rollout"),
    ]
    assert length_saving(lines).ratio == 0.5


def test_stale_and_empty_rollouts_count() -> None:
    lines = [
        line("treated", 20, ending="dropped", reason="stale"),
        line("treated", 60, ending="dropped", reason="empty"),
        line("control", 80),
    ]
    assert length_saving(lines).ratio == 0.5


@pytest.mark.parametrize("arms", [[], ["treated"], ["control"]])
def test_without_rollouts_in_an_arm_there_is_no_saving(arms: list[str]) -> None:
    saving = length_saving([line(arm, 10) for arm in arms] + [line("control", 5, active=False)])
    assert (saving.ratio, saving.low, saving.high) == (None, None, None)


def test_the_interval_has_its_coverage_and_clusters_by_prompt() -> None:
    """Eight copies of every rollout with the same prompt are no new information."""
    rng = np.random.default_rng(3)
    lines = []
    for problem in range(60):
        level = float(rng.gamma(4.0, 20.0))
        lines.append(line("treated", int(level * rng.uniform(0.4, 0.8)) + 1, problem=problem))
        lines.append(line("control", int(level * rng.uniform(0.8, 1.2)) + 1, problem=problem))
    once, copied = length_saving(lines), length_saving(lines * 8)
    apart = length_saving([replace(one, problem=100 * copy + one.problem) for copy in range(8) for one in lines])
    assert once.ratio == pytest.approx(0.4, abs=0.08)
    for saving in (once, copied, apart):
        assert saving.low is not None
        assert saving.high is not None
        assert saving.low < once.ratio < saving.high

    def width(saving: Any) -> float:
        return float(saving.high - saving.low)

    assert width(copied) == pytest.approx(width(once), rel=1e-9)
    # Independent prompts: √8 narrower.
    assert width(apart) == pytest.approx(width(once) / 8**0.5, rel=0.25)


def test_the_interval_is_the_same_every_time() -> None:
    lines = [line(arm, 10 + n, problem=n) for n in range(9) for arm in ("treated", "control")]
    assert length_saving(lines) == length_saving(list(reversed(lines)))


def test_totals_of_an_arm() -> None:
    totals = arm_totals([line("treated", 10), line("treated", 21), line("control", 7)], "treated")
    assert totals == ArmTotals(
        rollouts=2,
        tokens_generated=31,
        tokens_kept=25,
        tokens_trained=25,
        tokens_detection=4,
        tokens_overshoot=2,
        mean_generated=15.5,
        dropped={},
    )
    assert arm_totals([], "control").mean_generated is None


def put(folder: Path, name: str, *lines: dict[str, Any] | BookLine) -> None:
    trees = [one.to_json() if isinstance(one, BookLine) else one for one in lines]
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in trees))


def test_a_summary_of_a_whole_folder(tmp_path: Path) -> None:
    cut = line("treated", 40, finish_reason="kl_trap")
    put(tmp_path, "rollouts.jsonl", line("treated", 40), line("control", 80), cut)
    put(tmp_path, "metrics.jsonl", step_line(1), step_line(2, policy_version=5))
    put(tmp_path, "eval.jsonl", evaluation(5, 0.5), evaluation(0, 0.25))
    ledger = {"admitted": 3, "trained": 3, "dropped": {}, "dead": 0, "open": 0}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    (tmp_path / "wall.json").write_text('{"wall_s": 12.5}')
    written = write_summary(tmp_path)
    assert written == summarize(tmp_path) == RunFolder(tmp_path).summary
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["policy_version"], summary["wall_s"]) == (2, 5, 12.5)
    assert summary["length_saving"]["ratio"] == 0.5
    assert summary["finish_reasons"] == {"eos": 2, "kl_trap": 1}
    assert [one["policy_version"] for one in summary["eval"]] == [0, 5]
    assert summary["arms"]["treated"]["rollouts"] == 2
    assert summary["ledger"] == ledger
    assert not list(tmp_path.glob("*.tmp"))


def test_an_empty_folder_has_a_summary(tmp_path: Path) -> None:
    assert write_summary(tmp_path) == RunFolder(tmp_path).summary
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["wall_s"], summary["ledger"]) == (0, None, {})
    assert summary["length_saving"] == {"ratio": None, "low": None, "high": None}


def test_torn_last_lines_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "rollouts.jsonl", line("treated", 40))
    put(tmp_path, "metrics.jsonl", step_line(1))
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "arm')
    summary = summarize(tmp_path)
    assert summary.steps == 1
    assert summary.arms["treated"].rollouts == 1
