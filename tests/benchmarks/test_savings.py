"""What termination saves and costs: figures from runs' folders, worked by hand; arguments; tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import savings
from comparison import in_words
from made_pair import make_config
from run_folders import line, step_line, write_lines
from savings import ROOT, NeverActive, active_from, compared, control_share, overshoot, table

from common.runfiles.run import RunFolder


def folder_of(path: Path, seconds_a_step: float, tokens_a_step: int, lines: list[dict[str, Any]]) -> Path:
    """A run of six steps, the first at second 100."""
    path.mkdir()
    steps = [
        step_line(
            number,
            unix_s=100.0 + seconds_a_step * (number - 1),
            tokens_generated=1000 + tokens_a_step * number,
            tokens_trained_total=80 * number,
        )
        for number in range(1, 7)
    ]
    write_lines(path / "metrics.jsonl", steps)
    write_lines(path / "rollouts.jsonl", lines)
    return path


def stopped(over: int, **changes: Any) -> dict[str, Any]:
    return line(finish_reason="kl_trap", tokens_overshoot=over, **changes)


LINES = [
    line(active=False, verdict_unix_s=90.0, tokens_generated=999),  # before the policy was in force
    stopped(2, verdict_unix_s=101.5, tokens_generated=10),
    stopped(6, verdict_unix_s=102.5, tokens_generated=20),
    line(verdict_unix_s=103.0, tokens_generated=30),
    line(arm="control", verdict_unix_s=103.0, tokens_generated=60),
]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "none": folder_of(tmp_path / "none", 2.0, 100, [line(active=False)]),
        "kat": folder_of(tmp_path / "kat", 1.0, 80, LINES),
        "no control arm": folder_of(tmp_path / "no-control-arm", 0.9, 70, []),
    }


def test_figures_are_counted_from_the_step_at_which_the_policy_was_active(folders: dict[str, Path]) -> None:
    found = compared(folders, chunk_tokens=4)
    assert found["active_from_step"] == 3  # at second 102: the first step after second 101.5
    assert found["runs"]["kat"] == {
        "seconds": 3.0,
        "tokens_generated": 240,
        "tokens_trained": 240,
        "steps_per_s": 1.0,
        "generated_tokens_per_s": 80.0,
    }
    assert found["runs"]["none"]["seconds"] == 6.0  # the same three steps
    assert found["saved"] == pytest.approx({"tokens": 0.2, "seconds": 0.5, "seconds_per_token_saved": 2.5})
    assert found["cost"] == pytest.approx({"no control arm": 0.1})


def test_overshoot_is_that_of_stopped_rollouts_in_tokens_and_in_chunks(folders: dict[str, Path]) -> None:
    found = overshoot(RunFolder(folders["kat"]), chunk_tokens=4)
    tokens = {"tokens_p50": 4.0, "tokens_p95": 5.8, "tokens_p99": 5.96}
    expected = {"stopped": 2, **tokens, "chunks_p50": 1.0, "chunks_p95": 1.45}
    assert found == pytest.approx(expected)


def test_the_control_arm_costs_what_it_wrote_beyond_treated_rollouts(folders: dict[str, Path]) -> None:
    assert control_share(RunFolder(folders["kat"])) == pytest.approx((60 - 20) / 120)


def test_a_policy_that_was_never_active_is_said(folders: dict[str, Path]) -> None:
    run = RunFolder(folders["none"])
    with pytest.raises(NeverActive, match=r"active in 0 steps; expected more --steps"):
        active_from(run)
    with pytest.raises(NeverActive, match="no rollout was stopped"):
        overshoot(run, 4)
    with pytest.raises(NeverActive, match="an arm has no rollout"):
        control_share(run)


def test_tables_say_what_was_switched(folders: dict[str, Path]) -> None:
    text = table([compared(folders, chunk_tokens=4)])
    assert "| seconds that `kat` did not take, share of those of `none` | 50.0% (50.0% to 50.0%) |" in text
    assert "| kat | 1 (1–1) | 80 (80–80) |" in text
    assert "costs against `no control arm` | 10.0%" in text
    assert "- `no control arm`: termination.control_fraction: 0.0, termination.calibrate_on: all" in text
    assert "no key switches that off" in text
    alone = table([compared({"kat": folders["kat"], "none": folders["none"]}, chunk_tokens=4)])
    assert "control arm:" not in alone and "no key switches that off" not in alone


def test_a_median_has_its_range() -> None:
    assert in_words([3.0, 1.0, 1000.0]) == "3 (1–1,000)"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out"),
        (["--out", "{}"], "expected a file in a folder that is there"),
        (["--out", "{}/o.json", "--only", "all"], "--only: 'all' is not a part; allowed: saving, cost"),
        (["--out", "{}/o.json", "--steps", "0"], "a whole number of at least 1"),
    ],
)
def test_bad_arguments_exit_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        savings.main([word.format(tmp_path) for word in words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_a_wrong_key_exits_with_2_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "o.json"), "--work", str(tmp_path / "runs"), "--set", "learner.step=3"]
    assert savings.main(words) == 2
    assert "learner.step" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_each_part_makes_the_runs_that_it_needs(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "o.json")]
    assert savings.parse_arguments([*out, "--only", "saving"]).runs == ["none", "kat"]
    everything = savings.parse_arguments(out)
    assert everything.runs == [*savings.VARIANTS]
    configs = {name: savings.config_of(everything, name, 2) for name in everything.runs}
    assert len({config.run_dir for config in configs.values()}) == len(configs)
    assert {(config.seed, config.learner.max_steps, config.eval.every_steps) for config in configs.values()} == {
        (2, 40, 0)
    }
    neither = configs["neither"]
    assert (neither.termination.control_fraction, neither.feeder.record_traces) == (0.0, False)


def test_all_runs_but_none_have_kat_on_the_made_pair_too(tmp_path: Path) -> None:
    arguments = savings.parse_arguments(["--out", str(tmp_path / "o.json"), "--pair", "made"])
    arguments.config = tmp_path / "made.yaml"
    arguments.config.write_text(make_config(ROOT / "ops/models"))
    policies = [savings.config_of(arguments, name, 1).termination.policy for name in arguments.runs]
    assert policies == ["none", "kat", "kat", "kat", "kat"]
