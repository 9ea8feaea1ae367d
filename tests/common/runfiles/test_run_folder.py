"""`RunFolder` on a folder that is empty, growing, complete or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import fill, fill_long, step_line

from common.config import ConfigError
from common.runfiles.lines import DamagedLine
from common.runfiles.records import Ledger
from common.runfiles.run import RunFolder


def test_an_empty_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    files = (run.rollouts, run.traces, run.audits, run.steps, run.trained, run.evaluations)
    assert not any(list(file()) or file.last(1000) or file.tail().read() or list(file.placed()) for file in files)
    assert (run.ledger, run.summary, run.wall_s, run.to_evaluate, run.begun) == (None, None, None, [], False)
    with pytest.raises(ConfigError, match=r"not a run's folder: it has no config\.yaml"):
        _ = run.config
    with pytest.raises(ConfigError, match=r"run\.json"):
        _ = run.run_key


def test_a_folder_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(fill(tmp_path))
    (tmp_path / "run.json").write_text('{"run_key": "small-1"}')
    (tmp_path / "wall.json").write_text('{"wall_s": 12}')
    assert (run.begun, run.config.name, run.run_key, run.wall_s) == (True, "small", "small-1", 12)
    assert [line.rid for line in run.rollouts()] == ["r0", "r1", "r2", "r3"]
    assert [trace.rid for trace in run.traces()] == ["r0", "r1", "r3"]
    assert [trace.rid for trace in run.traces({"r3", "r2", "r1"})] == ["r1", "r3"]
    assert [step.step for step in run.steps()] == [1, 2]
    assert [(one.step, one.scores.avg_at_k) for one in run.evaluations()] == [(0, 0.2), (2, 0.4)]
    assert run.ledger == Ledger(4, 4, {}, 0, 0)


def test_weights_to_evaluate_are_in_the_order_of_their_versions(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for name in ("v00000010.json", "v00000002.json", "v00000002.safetensors", "v00000003.tmp"):
        (tmp_path / "eval" / name).touch()
    assert [path.name for path in RunFolder(tmp_path).to_evaluate] == ["v00000002.json", "v00000010.json"]


@pytest.mark.parametrize("name", ["ledger", "summary", "wall"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}\.json: damaged \(.+; expected the {name} of a run"):
        getattr(RunFolder(tmp_path), "wall_s" if name == "wall" else name)


def test_damage_is_told_by_field(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"admitted": 1, "trained": null, "dropped": {}, "dead": 0, "open": 1}')
    with pytest.raises(ConfigError, match=r"damaged \(trained is None, expected int\); expected the ledger of a run"):
        _ = RunFolder(tmp_path).ledger


def test_a_damaged_line_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{json.dumps(step_line(1))}\n{{"step": 2}}\n{json.dumps(step_line(3))}\n{{"step"')
    steps = RunFolder(tmp_path).steps
    for read in (steps, steps.placed):
        with pytest.raises(DamagedLine, match=r"metrics\.jsonl:2: damaged \(policy_version is missing\)"):
            list(read())
    assert [step.step for step in steps(damaged=str)] == [step.step for step in steps.last(1 << 20)] == [1, 3]


def test_lines_are_read_again_by_their_offsets(tmp_path: Path) -> None:
    traces = RunFolder(fill_long(tmp_path, 20)).traces
    placed = dict(traces.placed())
    chosen = list(placed)[3::5]
    assert traces.at(chosen) == {place: placed[place] for place in chosen}
    assert list(placed.values()) == list(traces())


def test_a_tail_reads_what_is_new(tmp_path: Path) -> None:
    tail = RunFolder(tmp_path).steps.tail()
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step_line(1)) + "\n" + json.dumps(step_line(2))[:9])
    assert [step.step for step in tail.read()] == [1]
    with path.open("a") as file:
        file.write(json.dumps(step_line(2))[9:] + "\n")
    assert [step.step for step in tail.read()] == [2]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(ConfigError, match=r"ledger\.json: damaged"):
        _ = RunFolder(tmp_path).ledger
