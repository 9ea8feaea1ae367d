"""The arithmetic task: its generator, its splits, its verifier."""

from __future__ import annotations

import subprocess
import sys

import pytest
from data_sets import solution_of

from ops.tasks import Problem
from ops.tasks.arithmetic import (
    ALPHABET,
    LARGEST_RESULT,
    SMALLEST_RESULT,
    Arithmetic,
    split_of,
    steps_of,
    terms_of,
)

TASK = Arithmetic()
WORKED = Problem(prompt="12+7-3?", answer="16")
NEGATIVE = Problem(prompt="3-7?", answer="-4")


def test_a_problem_depends_on_index_split_and_seed_alone() -> None:
    assert TASK.problem(5, split="train", seed=3) == TASK.problem(5, split="train", seed=3)
    drawn = {TASK.problem(index, split="train", seed=seed).prompt for index in range(20) for seed in range(3)}
    assert len(drawn) == 60


def test_problems_are_the_same_in_another_process() -> None:
    code = "from ops.tasks.arithmetic import Arithmetic\nprint(Arithmetic().problem(7, split='eval', seed=1).prompt)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert printed.stdout.strip() == TASK.problem(7, split="eval", seed=1).prompt


def test_importing_the_task_imports_no_torch() -> None:
    code = "import sys, ops.tasks.arithmetic as _; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0


def test_no_prompt_is_in_both_splits() -> None:
    # Short problems, so that prompts do repeat and an overlap would show.
    short = Arithmetic(min_numbers=2, max_numbers=3)
    train = {short.problem(index, split="train", seed=0).prompt for index in range(3000)}
    held_out = {short.problem(index, split="eval", seed=1).prompt for index in range(3000)}
    assert train.isdisjoint(held_out)
    assert all(split_of(prompt) == "eval" for prompt in held_out)
    assert all(split_of(prompt) == "train" for prompt in train)


def test_splits_do_not_move_between_versions() -> None:
    assert [split_of(prompt) for prompt in ("12+7-3?", "1+1?")] == ["train", "train"]
    assert [split_of(prompt) for prompt in ("3+3?", "8+5?")] == ["eval", "eval"]


def test_problems_keep_to_their_sizes_and_their_answers_are_right() -> None:
    for index in range(500):
        problem = TASK.problem(index, split="train", seed=2)
        first, terms = terms_of(problem.prompt)
        steps = steps_of(first, terms)
        assert TASK.min_numbers <= len(terms) + 1 <= TASK.max_numbers
        assert all(1 <= abs(int(term)) <= TASK.max_value for term in terms)
        assert SMALLEST_RESULT <= first <= TASK.max_first
        assert len(set(terms)) == len(terms)
        assert all(SMALLEST_RESULT <= step.result <= LARGEST_RESULT for step in steps)
        assert problem.answer == str(first + sum(map(int, terms)))
        assert len(problem.prompt) <= TASK.max_prompt_length
        assert set(problem.prompt + solution_of(problem.prompt)) <= set(ALPHABET)


def test_the_solution_is_written_out_as_documented() -> None:
    assert solution_of("12+7-3?") == "12+7=19;19-3=16#16"
    assert solution_of("5?") == "#5"


@pytest.mark.parametrize(
    ("problem", "completion", "right", "end"),
    [
        (WORKED, "12+7=19;19-3=16#16", True, 18),
        (WORKED, "#16", True, 3),
        (WORKED, "12+7=20;20-3=17#16", True, 18),  # the chain need not be right
        (WORKED, "12+7=19;19-3=16#17", False, 18),
        (WORKED, "#16\n4+5?4+5=9#9", True, 3),  # rambling does not matter
        (WORKED, "#16#17", True, 3),
        (WORKED, "#17#16", False, 3),  # the first "#" counts
        (WORKED, "#16-4", True, 3),
        (WORKED, "#160", False, 4),
        (WORKED, "#016", False, 4),  # compared as text
        (WORKED, "#+16", False, None),
        (WORKED, "#-16", False, 4),
        (WORKED, "# 16", False, None),
        (WORKED, "#", False, None),
        (WORKED, "#-", False, None),
        (WORKED, "##16", False, None),
        (WORKED, "12+7=19;19-3=16", False, None),
        (WORKED, "", False, None),
        (NEGATIVE, "3-7=-4#-4", True, 9),
        (NEGATIVE, "3-7=-4#4", False, 8),
        (NEGATIVE, "#-4;", True, 3),
    ],
)
def test_verdicts(problem: Problem, completion: str, right: bool, end: int | None) -> None:
    assert TASK.verify(problem, completion) is right
    assert TASK.answer_end(problem, completion) == end


@pytest.mark.parametrize(
    "sizes",
    [
        {"min_numbers": 1},
        {"min_numbers": 9, "max_numbers": 8},
        {"max_first": 9},
        {"max_first": 100},
        {"max_value": 6},
        {"max_value": 41},
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need"):
        Arithmetic(**sizes)


def test_what_is_no_index_or_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        TASK.problem(-1, split="train", seed=0)
    with pytest.raises(ValueError, match="not an arithmetic prompt"):
        terms_of("12+7")
