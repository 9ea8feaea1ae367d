"""Verdicts on answers in the styles of GSM8K, MATH, AIME and Minerva, and on completions made to hang or to crash."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ops.tasks.verifiers import Exact, MathVerify, Nobody, answer_end, excerpt, final_answer, gold


@pytest.fixture(scope="module")
def judge() -> Iterator[MathVerify]:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verifier = MathVerify()
    verifier.prepare()
    yield verifier


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 1,234 ", "1,234"),
        ("so it is $\\boxed{\\frac{x}{2}}$.", "\\frac{x}{2}"),
        ("$\\boxed{1}$, no, $\\boxed{2}$", "2"),
        ("\\boxed{\\text{a}_{1}", "\\boxed{\\text{a}_{1}"),  # never closed: not a box
        ("$x+1$", "x+1"),
        ("204", "204"),
    ],
)
def test_the_answer_is_found_in_a_worked_solution(answer: str, text: str) -> None:
    assert gold(answer) == text


def test_the_end_of_the_final_answer() -> None:
    text = "so \\boxed{7} and on"
    assert answer_end(text) == len("so \\boxed{7}")
    assert answer_end("so\n####  7 \nmore") == len("so\n####  7")
    assert answer_end("####" + " " * 50_000) is None
    assert answer_end("nothing") is None
    assert final_answer("\\boxed{" * 50_000) is None
    assert final_answer("}" * 50_000 + "\\boxed{\\boxed{7}") == (50_014, 50_015)


def test_what_math_verify_is_shown_is_the_last_box_or_the_end_and_bounded() -> None:
    assert excerpt("\\boxed{6} " * 9 + "\\boxed{\\{7, {8}\\}}" + "} rambling {" * 1000) == "\\boxed{\\{7, {8}\\}}"
    assert excerpt("y" * 5000) == "y" * 2000
    assert excerpt("short") == "short"
    assert len(excerpt("\\boxed{" + "1" * 5000 + "}")) == 2000


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("#### 72", "24 + 48 = 72\n#### 72", True),
        ("72", "#### 7", False),
        ("7", "7", True),
        ("7", " \\boxed{7}.", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", False),  # equal text, and no more
    ],
)
def test_exact(answer: str, completion: str, right: bool) -> None:
    assert Exact().verify(answer, completion) is right
    assert Nobody().verify(answer, completion) is None


@pytest.mark.timeout(180)
def test_math_verify(judge: MathVerify) -> None:
    for answer, completion, right in [
        ("3*24 = <<3*24=72>>72.\n#### 72", "There are \\boxed{72} eggs.", True),
        ("#### 72", "There are 72 eggs, so the answer is 72.", True),
        ("#### 1,234", "\\boxed{1234}", True),
        ("#### 72", "\\boxed{27}", False),
        ("\\boxed{\\frac{x}{2}}", "Thus $\\boxed{0.5x}$.", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "$$\\boxed{(3, \\pi/2)}$$", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(\\pi/2, 3)}", False),
        ("p - q", "\\boxed{-q+p}", True),
        ("073", "\\boxed{73}", True),
        ("204", "\\boxed{203}... wait, \\boxed{204} and then I ramble on 7 8 9", True),
        ("204", "I do not know.", False),
        ("204", "", False),
        ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", True),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
        ("18", "\\boxed{18\\text{ dollars}}", True),
        ("x\u2028y", "line\nbreaks \u2028 \\boxed{1}\n", False),
    ]:
        assert judge.verify(answer, completion) is right, (answer, completion)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_hostile_completion_is_wrong_in_bounded_time_and_the_next_is_judged(judge: MathVerify) -> None:
    assert judge.verify("2", "\\boxed{2}") is True
    for hostile in [
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{10^{10^{10}}}",
        "\\boxed{(10^{8})!}",
        "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
        "\\boxed{" + "\\frac{1}{" * 190 + "2" + "}" * 190 + "}",
        "\\boxed{\\int_0^1 x^{x^{x^{x}}} dx + \\sum_{n=1}^{10^9} \\frac{1}{n}}",
    ]:
        began = time.process_time(), time.monotonic()
        assert judge.verify("7", hostile) is False, hostile
        assert time.process_time() - began[0] < 1.0, "it is not this process that works"
        assert time.monotonic() - began[1] < 45.0, hostile
    assert judge.verify("2", "\\boxed{2}") is True


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_judge_leaves_the_verdict_open_and_is_started_again(judge: MathVerify) -> None:
    assert judge.verify("2", "\\boxed{2}") is True
    assert judge._judge is not None
    os.kill(judge._judge.pid, signal.SIGKILL)
    assert judge.verify("2", "\\boxed{2}") is None
    assert judge.verify("2", "\\boxed{2}") is True


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_judge_ends_with_its_verifier() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verifier = MathVerify()
    assert verifier.verify("2", "\\boxed{2}") is True
    process = verifier._judge
    assert process is not None
    del verifier
    assert process.returncode == 0
