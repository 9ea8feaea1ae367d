"""Records and lines: torn lines are ignored, damage is named, records are read as they were written."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import step_line
from samples import make_verdict, make_view

from common.runfiles.lines import DamagedLine, Lines, append_lines, open_whole_lines, read_lines
from common.runfiles.records import (
    ArmTotals,
    Audit,
    BookLine,
    Chunk,
    Ended,
    Evaluation,
    Ledger,
    Lengths,
    Saving,
    Scores,
    Step,
    Summary,
    ToEvaluate,
    Trace,
    Trained,
    Wall,
)

LINE = BookLine(
    rid="r1",
    arm="treated",
    problem=0,
    finish_reason="eos",
    ending="trained",
    reason="",
    active=True,
    tokens_generated=10,
    tokens_kept=4,
    tokens_trained=10,
    tokens_detection=2,
    tokens_overshoot=4,
    threshold=0.5,
    min_window=None,
    policy_version_first=0,
    policy_version_last=1,
    staleness=0,
    correct=None,
)
CHUNKS = [Chunk(0, None, 0, 3, 1, "n1", "eos", "ab", None), Chunk(1, broken="torn")]
SCORES = Scores(4, 8, 0.5, 0.75, 9.0, 1.0)
BENCHMARKS = Scores(4, 8, 0.5, 0.75, 9.0, 1.0, unjudged=2, benchmarks={"short": SCORES})
LEDGER = Ledger(admitted=9, trained=4, dropped={"stale": 2}, dead=1, open=2)
SUMMARY = Summary(
    steps=2,
    policy_version=3,
    wall_s=None,
    arms={"treated": ArmTotals(1, 10, 4, 0, 2, 4, 10.0, {"stale": 1})},
    length_saving=Saving(0.5, 0.25, 0.75),
    endings={"stale": Ended("stale", 1, 0.5, Lengths(1, 4.0, 0.0), None, 0)},
    finish_reasons={"eos": 1},
    evaluations=[Evaluation(3, 2, 40, BENCHMARKS, 1.5)],
    ledger=None,
)
RECORDS = [
    LINE,
    Step.from_json(step_line(1)),
    ToEvaluate(3, 2, 40, "ab"),
    Evaluation(3, 2, 40, BENCHMARKS, 1.5),
    LEDGER,
    SUMMARY,
    replace(SUMMARY, ledger=LEDGER),
    Trace.of(make_verdict()),
    Trace.of(make_verdict(view=make_view().view)),
    Trained(1, 2, ["r1", "r2"], [3, 4], ["ab", "cd"]),
    Audit("r1", [("n1", 0), ("n2", 1)], CHUNKS, "0.25", True),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written(record: Any) -> None:
    tree = json.loads(json.dumps(record.to_json()))
    assert type(record).from_json(tree) == record
    assert type(record).from_json(tree | {"newer": [1]}) == record


def test_the_format_of_lines_has_not_changed() -> None:
    """Names, their order, and which fields are omitted while they are 0 or empty."""
    line = Evaluation(3, 2, 40, SCORES, 1.5).to_json()
    scores = {"k": 4, "n": 8, "avg@k": 0.5, "pass@k": 0.75, "mean_length": 9.0, "eos_rate": 1.0}
    assert list(line.items()) == list(
        ({"policy_version": 3, "step": 2, "tokens_trained": 40} | scores | {"wall_s": 1.5}).items()
    )
    assert list(BENCHMARKS.to_json().items())[-2:] == [("unjudged", 2), ("benchmarks", {"short": scores})]
    assert json.dumps(Step.from_json(step_line(1)).to_json()) == json.dumps(step_line(1))
    assert (
        json.dumps(LEDGER.to_json()) == '{"admitted": 9, "trained": 4, "dropped": {"stale": 2}, "dead": 1, "open": 2}'
    )
    assert list(SUMMARY.to_json())[-2:] == ["eval", "ledger"] and SUMMARY.to_json()["ledger"] == {}
    assert list(Trace.of(make_verdict()).to_json())[-5:] == ["cut", "threshold", "version", "tokens", "divergence"]
    assert list(Trace.of(make_verdict(view=make_view().view)).to_json())[-2:] == ["divergence", "view"]


def test_steps_of_older_runs_read() -> None:
    late = {"support_mass_teacher", "topk_overlap", "repetition", "truncation_rate", "threshold", "tokens_generated"}
    late |= {"cut_rate_treated", "cut_rate_control"}
    old = Step.from_json({name: value for name, value in step_line(1).items() if name not in late})
    assert {getattr(old, name) for name in late} == {None}
    with pytest.raises(ValueError, match="loss is missing"):
        Step.from_json({"step": 1, "policy_version": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropped": {"stale": "2"}}, "dropped is '2', expected int"),
        ({"dropped": [2]}, "dropped is .2., expected dict"),
        ({"open": -1}, "open is -1, below 0"),
    ],
)
def test_what_a_field_holds_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ledger.from_json(LEDGER.to_json() | change)


def test_a_ledger_is_made_of_counts_and_returns_them() -> None:
    counts = {"admitted": 9, "trained": 4, "dropped:stale": 2, "dead": 1}
    assert Ledger.of(counts) == LEDGER
    assert (LEDGER.counts, LEDGER.ended) == (counts, 7)
    assert Ledger.of({}) == Ledger(0, 0, {}, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "other"}, "arm is 'other'"),
        ({"keep": 9, "trigger": 8}, "keep 9, trigger 8"),
        ({"divergence": base64.b64encode(b"1234").decode()}, "tokens with 1 divergences"),
        ({"tokens": "?"}, "base64|padding"),
    ],
)
def test_a_trace_must_be_consistent(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace.from_json(Trace.of(make_verdict()).to_json() | change)


def test_books_of_older_runs_read() -> None:
    late = ("admitted_unix_s", "verdict_unix_s", "ended_unix_s", "tokens_trainable")
    old = {name: value for name, value in LINE.to_json().items() if name not in late}
    assert BookLine.from_json(old) == LINE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_kept": "4"}, "tokens_kept is '4', expected int"),
        ({"tokens_kept": True}, "tokens_kept is True, expected int"),
        ({"tokens_kept": -1}, "tokens_kept is -1, below 0"),
        ({"threshold": float("nan")}, "threshold is not finite"),
        ({"active": None}, "active is None, expected bool"),
    ],
)
def test_every_field_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BookLine.from_json(LINE.to_json() | change)


@pytest.mark.parametrize(
    ("reason", "kept", "stopped", "fired"),
    [
        ("eos", 10, False, False),
        ("eos", 4, False, True),
        ("kl_trap", 4, True, True),
        ("fixed", 10, True, True),
        ("length", 10, False, False),
        ("unfinished", 10, False, False),
    ],
)
def test_fired_and_stopped(reason: str, kept: int, stopped: bool, fired: bool) -> None:
    one = BookLine.from_json(LINE.to_json() | {"finish_reason": reason, "tokens_kept": kept})
    assert (one.stopped, one.fired) == (stopped, fired)


def test_a_torn_line_is_ignored_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"a":1}\n[2]\n{"a":3}\n{"a"')
    with pytest.raises(DamagedLine, match=r"rollouts.jsonl:2: damaged \(expected an object, found list\)"):
        list(read_lines(path))
    found: list[DamagedLine] = []
    assert list(read_lines(path, damaged=found.append)) == [{"a": 1}, {"a": 3}]
    assert [(one.path, one.number) for one in found] == [(path, 2)]
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


def test_lines_of_other_rollouts_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"rid":"r1"}\n{"rid":"r2",oops\n{"rid":"r3"}\n')
    assert [one["rid"] for one in read_lines(path, rids={"r3", "r1"})] == ["r1", "r3"]


def test_lines_are_appended_after_the_last_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "wall.jsonl"
    path.write_bytes(b'{"wall_s":1}\n{"wa')
    with open_whole_lines(path) as file:
        append_lines(file, [Wall(2)])
    assert path.read_bytes() == b'{"wall_s":1}\n{"wall_s":2}\n'


def test_a_file_is_cut_back_by_replacing_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step_line(step)) + "\n" for step in (1, 2, 3, 2)) + '{"st')
    steps = Lines(path, Step)
    with path.open("a") as former, steps.open_cut_back(lambda line: line.step <= 2) as file:
        former.write("late")
        file.write(json.dumps(step_line(3)) + "\n")
    assert [one.step for one in steps()] == [1, 2, 3]
