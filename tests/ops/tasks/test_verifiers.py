"""Verdicts on answers in the styles of GSM8K, MATH, AIME and Minerva, and on completions made to hang or to crash."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import ConfigError
from ops.tasks.verifiers import (
    Exact,
    MathVerify,
    NoVerifier,
    answer_end,
    excerpt,
    final_answer,
    find_verifier,
    gold,
    in_box,
    rehearse,
)

pytestmark = pytest.mark.slow


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
        ("$$5$$", "5"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("#### 3\nNo, once more.\n#### 4\n####", "4"),
        ("##### a heading\n#### 4", "4"),
        ("so \\boxed {6}", "6"),
        ("so \\fbox{6}", "6"),
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
    assert answer_end("#### " * 20_000) is None
    assert answer_end("\\boxed" + " " * 50_000) is None
    assert answer_end("nothing") is None
    assert final_answer("\\boxed{" * 50_000) is None
    assert final_answer("}" * 50_000 + "\\boxed{\\boxed{7}") == (50_014, 50_015)


def test_what_math_verify_is_shown_is_the_last_box_or_the_end_and_bounded() -> None:
    assert excerpt("\\boxed{6} " * 9 + "\\boxed{\\{7, {8}\\}}" + "} rambling {" * 1000) == "\\boxed{\\{7, {8}\\}}"
    assert excerpt("y" * 5000) == "y" * 2000
    assert excerpt("short") == "short"
    assert len(excerpt("\\boxed{" + "1" * 5000 + "}")) == 2000
    assert len(excerpt("\\boxed{" + "1" * 200_000 + "}")) == 2000  # and soon: nothing in it takes the square of that


def test_what_is_thought_is_no_answer() -> None:
    assert excerpt("<think>\\boxed{3}</think>It is 7.") == "It is 7."
    assert excerpt("<think>\\boxed{3}</think> \\boxed{7}") == "\\boxed{7}"
    assert excerpt("<think>\\boxed{3}</think>\n") == "\\boxed{3}"
    assert Exact().verify("7", "<think>#### 3\n</think>\n7") is True


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (" 5. ", "5"),
        ("5,", "5"),
        ("5\\,", "5\\,"),
        ("70\\,000", "70000"),
        ("1\\,0", "1\\,0"),
        ("4.5e33", "4.5\\times 10^{33}"),
        ("-.5E-3", "-.5\\times 10^{-3}"),
        ("5e", "5e"),
    ],
)
def test_an_answer_is_put_as_math_verify_reads_it(answer: str, shown: str) -> None:
    assert in_box(answer) == f"\\boxed{{{shown}}}"


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("#### 72", "24 + 48 = 72\n#### 72", True),
        ("72", "#### 7", False),
        ("7", "7", True),
        ("7", " \\boxed{7}.", True),
        ("$5$", "$5$", True),
        ("$5$", "5", True),
        ("5", "\\boxed{$5$}", True),
        ("#### 3\n#### 4", "#### 4", True),
        ("4", "#### 3\nNo.\n#### 4", True),
        ("3", "#### 3\nNo.\n#### 4", False),
        ("\\frac{1}{2}", "\\boxed{0.5}", False),  # equal text, and no more
    ],
)
def test_exact(answer: str, completion: str, right: bool) -> None:
    assert Exact().verify(answer, completion) is right
    assert NoVerifier().verify(answer, completion) is None


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


@pytest.mark.timeout(180)
def test_an_answer_as_it_is_written_by_some(judge: MathVerify) -> None:
    for answer, completion in [
        ("5", "\\boxed{5.}"),
        ("5", "\\boxed{5,}"),
        ("5", "\\boxed {5}"),
        ("5", "\\fbox{5}"),
        ("70000", "\\boxed{70\\,000}"),
        ("70\\,000", "\\boxed{70000}"),
        ("4.5e33", "\\boxed{4.5e33}"),
        ("7", "<think>\\boxed{3}</think> 7"),
    ]:
        assert judge.verify(answer, completion) is True, (answer, completion)


@pytest.mark.timeout(180)
def test_numbers_are_compared_by_their_size(judge: MathVerify) -> None:
    for answer, completion, right in [
        ("6.63e-34", "6.63 \\times 10^{-34}", True),
        ("6.63e-34", "h = 6.63 \\times 10^{-34}", True),
        ("6.63e-34", "9.9 \\times 10^{-34}", False),
        ("6.63e-34", "0.0", False),
        ("6.63e-34", "0", False),
        ("3 \\times 10^{-20}", "4 \\times 10^{-20}", False),  # neither is a float
        ("3e-19", "4.8 \\times 10^{-19}", False),
        ("3e-19", "-4.8 \\times 10^{-19}", False),
        ("x = 3e-9", "x = 4 \\times 10^{-9}", False),
        ("0.0000001", "0.0000002", False),
        ("0.0000001", "10^{-7}", True),
        ("0", "0.0000001", False),
        ("0", "0.0", True),
        ("0", "\\sqrt{2}+\\sqrt{3}-\\sqrt{5+2\\sqrt{6}}", True),
        ("\\frac{1}{3}", "0.333333", True),
        ("\\frac{1}{15}", "0.066667", True),
        ("10\\%", "10", True),
        ("10", "10\\%", True),
        ("0.1", "10\\%", True),
        ("6+9i", "9i+6", True),
        ("\\infty", "\\infty", True),
    ]:
        assert judge.verify(answer, f"\\boxed{{{completion}}}") is right, (answer, completion)


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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_judge_that_cannot_start_is_an_error_and_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    (tmp_path / "antlr4").mkdir()
    (tmp_path / "antlr4" / "__init__.py").write_text("raise ImportError('of another version')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verifier = MathVerify()
    with pytest.raises(ConfigError, match=r"its judge ends at its start \(exit code 1\).*math_judge 2` says why"):
        verifier.verify("2", "\\boxed{2}")
    monkeypatch.delenv("PYTHONPATH")
    assert verifier.verify("2", "\\boxed{2}") is True


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_judge_that_is_killed_at_its_start_leaves_the_verdict_open() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    verifier = MathVerify()
    verifier.prepare()
    assert verifier._judge is not None
    os.kill(verifier._judge.pid, signal.SIGKILL)
    assert verifier.verify("2", "\\boxed{2}") is None
    assert verifier.verify("2", "\\boxed{2}") is True


@pytest.mark.parametrize("name", ["exact", "math-verify"])
def test_a_process_has_one_verifier_of_a_kind(name: str) -> None:
    if name == "math-verify":
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    first = find_verifier(name)
    assert find_verifier(name) is first


def test_a_rehearsal_tells_who_cannot_judge() -> None:
    class Silent(Exact):
        def verify(self, answer: str, completion: str) -> bool | None:
            return None

    class Wrong(Exact):
        def verify(self, answer: str, completion: str) -> bool | None:
            return False

    for good in (Exact(), NoVerifier()):
        rehearse(good)
    with pytest.raises(ConfigError, match="Silent gives no verdict"):
        rehearse(Silent())
    with pytest.raises(ConfigError, match="Wrong says that 1 is not 1"):
        rehearse(Wrong())
