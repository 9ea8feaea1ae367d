"""Cuts as an audit sees them: which are looked at, their classes on texts made by hand, what each is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import booked, fill, trace_line, write_lines

from common.config import ConfigError
from common.wire.messages import Ints
from ops.audit.cuts import (
    AFTER,
    BEFORE,
    LOOP,
    Reader,
    Recorded,
    answer_tokens,
    chosen,
    class_of,
    ends_in_loop,
    matched,
    read_records,
    read_tokens,
)
from ops.tasks import Problem
from ops.tasks.arithmetic import Arithmetic
from ops.tasks.verifiers import Exact, answer_end


def ids(text: str) -> Ints:
    """A token a character."""
    return np.array([ord(one) for one in text], np.int32)


def text_of(tokens: Ints) -> str:
    return "".join(chr(token) for token in tokens.tolist())


def arithmetic(answer: str) -> Reader:
    task, problem = Arithmetic(), Problem("", answer)
    return Reader(text_of, lambda tokens: task.verify(problem, text_of(tokens)), lambda t: task.answer_end(problem, t))


def mathematics(answer: str) -> Reader:
    return Reader(text_of, lambda tokens: Exact().verify(answer, text_of(tokens)), answer_end)


def record(number: int, **changes: Any) -> Recorded:
    values: dict[str, Any] = {
        "rid": f"r{number:09d}",
        "arm": "treated",
        "problem": number,
        "version": 5,
        "keep": 40,
        "trigger": 60,
        "written": 70,
        "fired": True,
        "active": True,
        "whole": None,
    }
    return Recorded(**values | changes)


def uncut(number: int, written: int = 100, **changes: Any) -> Recorded:
    """A rollout in which the policy did not fire."""
    return record(number, keep=written, trigger=written, written=written, fired=False, **changes)


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_run_s_folder_is_read(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    books = [booked(rid="r0"), booked(rid="r1", correct=False), booked(rid="r3", arm="control", correct=True)]
    found = read_records(folder / "traces.jsonl", books)
    assert [(one.rid, one.arm, one.keep, one.trigger, one.written, one.fired, one.whole) for one in found] == [
        ("r0", "treated", 10, 10, 10, False, True),
        ("r1", "treated", 2, 7, 8, True, None),  # stopped: what the books judge is not the whole
        ("r3", "control", 2, 7, 10, True, True),
    ]
    tokens = read_tokens(folder / "traces.jsonl", {"r1"})
    assert {rid: found.tolist() for rid, found in tokens.items()} == {"r1": [0, 1, 2, 3, 4, 5, 6, 7]}


def test_what_is_not_booked_yet_is_left_out(tmp_path: Path) -> None:
    assert [one.rid for one in read_records(fill(tmp_path) / "traces.jsonl", [booked(rid="r3")])] == ["r3"]


@pytest.mark.parametrize(
    "broken", [{"keep": 9, "trigger": 3}, {"tokens": "?"}, {"problem": "x"}, {"version": None}, {"cut": None, "rid": 3}]
)
def test_a_damaged_trace_is_named(tmp_path: Path, broken: dict[str, Any]) -> None:
    traces = [trace_line([0.5] * 6, 2, 4) | broken]
    write_lines(tmp_path / "traces.jsonl", traces)
    books = [booked()]
    if "rid" in broken:
        del traces[0]["keep"]
        write_lines(tmp_path / "traces.jsonl", traces)
    with pytest.raises(ConfigError, match=r"traces.jsonl:\d+: damaged"):
        read_records(tmp_path / "traces.jsonl", books)


# --- which ------------------------------------------------------------------------------------------------------------


def test_cuts_are_drawn_from_equal_stretches_of_the_run() -> None:
    cuts = [record(number) for number in range(103)]
    places = [one.problem for one in chosen(cuts, 10, seed=1)]
    assert len(places) == 10
    assert all(103 * at // 10 <= place < 103 * (at + 1) // 10 for at, place in enumerate(places))
    assert places == [one.problem for one in chosen(cuts, 10, seed=1)]
    assert places != [one.problem for one in chosen(cuts, 10, seed=2)]
    assert chosen(cuts[:3], 10, seed=1) == cuts[:3]


# --- what each is compared with ---------------------------------------------------------------------------------------


def test_a_cut_is_compared_with_what_was_going_and_not_cut_at_its_trigger() -> None:
    cut = record(0)
    ended = uncut(1, written=60)  # its last token is the one at which the cut one was cut
    earlier = record(2, trigger=60)  # cut at the same length
    inactive = uncut(3, active=False)  # the policy could not have cut it
    assert matched([cut], [cut, ended, earlier, inactive], seed=0) == [None]
    later = record(4, keep=45, trigger=61)  # cut, but not yet by then
    assert matched([cut], [cut, ended, earlier, inactive, later], seed=0) == [later]


def test_the_nearest_is_taken_by_prompt_then_version_then_arm() -> None:
    cut = record(0, problem=7, version=5)
    far, near = uncut(1, version=9), uncut(2, version=6, arm="control")
    assert matched([cut], [far, near], seed=0) == [near]
    beside = uncut(3, version=4)
    assert matched([cut], [far, near, beside], seed=0) == [beside]
    sibling = uncut(4, problem=7, version=9)
    assert matched([cut], [far, near, beside, sibling], seed=0) == [sibling]


def test_each_uncut_rollout_serves_once() -> None:
    cuts = [record(0), record(1), record(2, trigger=99)]
    pool = [uncut(3), uncut(4)]
    first, second, third = matched(cuts, pool, seed=0)
    assert {first, second} == set(pool)
    assert third is None
    assert {matched(cuts[:1], pool, seed=seed)[0] for seed in range(20)} == set(pool)  # equals: by draw


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["16", "17"])  # right, and wrong
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("12+7=19;19-3=16#16", 18),  # the 1 alone would be an answer, too
        ("12+7=19;19-3=16#16\n3+4?", 18),
        ("1=1#16;#9", 6),  # the first counts
        ("12+7=19;19-3=16#", None),
        ("", None),
    ],
)
def test_where_the_arithmetic_answer_ends(text: str, tokens: int | None, answer: str) -> None:
    for keep in (0, len(text) // 2, len(text)):
        assert answer_tokens(ids(text), keep, arithmetic(answer)) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (r"so \boxed{3}. No, wait: \boxed{4}", 12),  # it had an answer, whatever came of it
        (r"so \boxed{\frac{1}{2}}", 22),
        ("so\n#### 1,234\nand 5", 13),
        (r"so \boxed{3", None),
        (r"<think>\boxed{3}</think> hm, \boxed{4}", 38),  # a thought's is none
        (r"<think>\boxed{3}</think> hm, #### 4", 35),
        (r"<think>\boxed{3}</think> hm", None),
    ],
)
def test_where_a_wrong_answer_of_mathematics_ends(text: str, tokens: int | None) -> None:
    assert answer_tokens(ids(text), len(text) // 2, mathematics("7")) == tokens


def test_a_box_in_a_thought_is_not_the_right_answer() -> None:
    text = r"<think>\boxed{3}</think> hm, \boxed{4}"
    for keep in (0, 20, len(text)):
        assert answer_tokens(ids(text), keep, mathematics("4")) == 38 == len(text)


def test_an_answer_that_is_repeated_counts_from_the_first_time() -> None:
    text = r"2+2 is 4, so \boxed{4}." + r" So the answer is \boxed{4}." * 12
    first = text.index("}") + 1
    for keep, kind in ((first - 1, BEFORE), (first, AFTER), (60, AFTER)):
        answer = answer_tokens(ids(text), keep, mathematics("4"))
        assert class_of(ids(text), keep, keep, answer) == kind
    assert answer_tokens(ids(text), first, mathematics("4")) == first


def test_what_is_taken_back_is_kept_wrong() -> None:
    text = r"\boxed{4}, no: \boxed{5}, no, \boxed{4}"
    kept = [answer_tokens(ids(text), keep, mathematics("4")) for keep in (9, 24, len(text))]
    # What is kept of the second is wrong, so its answer is still to come.
    assert kept[0] == 9 and kept[1] == len(text)
    assert class_of(ids(text), 9, 9, kept[0]) == AFTER and class_of(ids(text), 24, 24, kept[1]) == BEFORE


def test_tokens_may_be_longer_than_characters() -> None:
    pieces = ["12", "=1", "2#", "1", "2", "\n#5"]
    tokens = np.arange(len(pieces), dtype=np.int32)

    def text(some: Ints) -> str:
        return "".join(pieces[one] for one in some.tolist())

    for answer in ("12", "3"):
        task, problem = Arithmetic(), Problem("", answer)
        judge = Reader(
            text,
            lambda some, task=task, problem=problem: task.verify(problem, text(some)),
            lambda said, task=task, problem=problem: task.answer_end(problem, said),
        )
        assert answer_tokens(tokens, 4, judge) == 5


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("3+4=7;" * 3, True),
        ("12+7=19;" + "3+4=7;" * 3, True),
        ("12+7=19;" + "3+4=7;" * 3 + "3+4", True),  # a copy begun
        ("12+7=19;" + "3+4=7;" * 2 + "3+4", False),  # two copies and a half
        ("3+4=7;" * 2, False),
        ("3+4=7;" * 4 + "9", False),  # left
        ("8" * 12, True),
        ("12+" + "8" * 11, False),  # eleven tokens are too few
        ("3+4=7;3+4=7;3+5=8;", False),
        ("", False),
    ],
)
def test_a_loop_is_three_copies_in_a_row_at_the_end(text: str, loop: bool) -> None:
    assert ends_in_loop(ids(text)) is loop


def test_classes() -> None:
    loop = ids("12+7=19;" + "3+4=7;" * 3 + "#7")
    assert class_of(loop, keep=8, trigger=26, answer=None) == LOOP
    assert class_of(loop, keep=8, trigger=20, answer=None) == BEFORE  # not yet a loop when the policy fired
    assert class_of(loop, keep=8, trigger=28, answer=28) == BEFORE  # answered behind the cut
    assert class_of(ids("1=1#1" + "ab" * 9), keep=5, trigger=23, answer=5) == AFTER  # though it loops there
