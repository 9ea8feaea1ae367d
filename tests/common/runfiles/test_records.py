"""A run's folder: lines are whole or not there, damage is named, records come back as they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from samples import make_verdict

from common.runfiles.lines import DamagedLine, append_lines, open_cut_back, open_whole_lines, read_lines, skip
from common.runfiles.records import Audit, BookLine, Chunk, Trace, Trained, Wall

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
RECORDS = [
    LINE,
    Trace.of(make_verdict()),
    Trained(1, 2, ["r1", "r2"], [3, 4], ["ab", "cd"]),
    Audit("r1", [("n1", 0), ("n2", 1)], CHUNKS, "0.25", True),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_written(record: Any) -> None:
    tree = json.loads(json.dumps(record.to_json()))
    assert type(record).from_json(tree) == record
    assert type(record).from_json(tree | {"newer": [1]}) == record


def test_books_of_older_runs_read() -> None:
    late = ("admitted_unix_s", "verdict_unix_s", "ended_unix_s", "tokens_trainable")
    old = {name: value for name, value in LINE.to_json().items() if name not in late}
    assert BookLine.from_json(old) == LINE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_kept": "4"}, "tokens_kept is '4', expected int"),
        ({"tokens_kept": True}, "tokens_kept is True, expected int"),
        ({"tokens_kept": -1}, "tokens_kept is -1, below 0"),
        ({"threshold": float("nan")}, "threshold is not finite"),
        ({"active": None}, "active is None, expected bool"),
    ],
)
def test_every_field_is_checked(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
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


def test_a_torn_line_is_not_there_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"a":1}\n[2]\n{"a":3}\n{"a"')
    with pytest.raises(DamagedLine, match=r"rollouts.jsonl:2: damaged \(expected an object, found list\)"):
        list(read_lines(path))
    assert list(read_lines(path, damaged=skip)) == [{"a": 1}, {"a": 3}]
    found: list[DamagedLine] = []
    assert len(list(read_lines(path, damaged=found.append))) == 2
    assert [(one.path, one.number) for one in found] == [(path, 2)]
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


def test_lines_of_other_rollouts_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"rid":"r1"}\n{"rid":"r2",oops\n{"rid":"r3"}\n')
    assert [one["rid"] for one in read_lines(path, rids={"r3", "r1"})] == ["r1", "r3"]


def test_what_is_appended_stands_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "wall.jsonl"
    path.write_bytes(b'{"wall_s":1}\n{"wa')
    with open_whole_lines(path) as file:
        append_lines(file, [Wall(2)])
    assert path.read_bytes() == b'{"wall_s":1}\n{"wall_s":2}\n'


def test_a_file_is_cut_back_in_another_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 2)) + '{"st')
    with path.open("a") as former, open_cut_back(path, lambda line: line["step"] <= 2) as file:
        former.write("late")
        file.write('{"step": 3}\n')
    assert [one["step"] for one in read_lines(path)] == [1, 2, 3]
