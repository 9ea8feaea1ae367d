"""What `katana replay` refuses is said once, and with what it takes instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import CONFIG, line, trace_line, write_lines

from common.rids import rid_of
from ops.cli.main import main


@pytest.fixture
def stopped(tmp_path: Path) -> str:
    """The folder of a run that could stop its rollouts: one of the control arm, one that was spared."""
    config = CONFIG.replace("./absent-", "ops/models/")
    rids = [rid_of(0), rid_of(1)]
    changes = {"admitted_unix_s": 1e9, "verdict_unix_s": 1e9 + 1}
    write_lines(
        tmp_path / "rollouts.jsonl",
        [line(rid=rid, arm=arm, **changes) for rid, arm in zip(rids, ("control", "treated"), strict=True)],
    )
    traces = [trace_line([0.5] * 10, 10, 10, arm, rid) for rid, arm in zip(rids, ("control", "treated"), strict=True)]
    write_lines(tmp_path / "traces.jsonl", traces)
    (tmp_path / "config.yaml").write_text(config)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("option", "item", "said"),
    [
        ("--set", "eta=0.1", "--set 'eta=0.1': expected termination.KEY=value, here termination.eta=0.1"),
        ("--sweep", "eta=0.1,0.2", "expected termination.KEY=value, here termination.eta=0.1,0.2"),
        ("--set", "seed=3", "expected key=value with a key of termination: termination.policy, termination.window"),
        ("--set", "termination.=3", "expected key=value with a key of termination: termination.policy"),
        ("--set", "eta", "expected key=value, for example termination.eta=0.1"),
        ("--set", "eta=", "expected key=value, for example termination.eta=0.1"),
        ("--set", "=0.1", "expected key=value, for example termination.eta=0.1"),
    ],
)
def test_a_key_that_is_not_of_termination_is_told_from_what_is_no_pair(
    stopped: str, option: str, item: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", stopped, option, item]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["calibrate_on=all"], "error: calibrate_on: all takes minima of treated rollouts"),
        (["control_fraction=0.25"], "error: control_fraction decides which rollouts"),
        (["eta=0.1", "calibrate_on=all"], "error: eta 0.1, calibrate_on all: calibrate_on: all takes minima"),
    ],
)
def test_what_the_record_cannot_tell_is_named_once(
    stopped: str, items: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [part for item in items for part in ("--set", f"termination.{item}")]
    assert main(["replay", stopped, *sets]) == 2
    assert capsys.readouterr().err.startswith(said)
