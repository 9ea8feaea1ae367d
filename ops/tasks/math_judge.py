"""The process that judges by math-verify: `python -m ops.tasks.math_judge CPU_SECONDS`, started by `verifiers.py`.

In: a line of JSON [answer, completion]. Out: "ready" once, then a line for each verdict, "right" or "wrong". Every
verdict is computed in a fork of this process, which the kernel kills when its CPU seconds or its memory are used up; so
no completion can hang this process, make it grow, or change the next verdict. It ends with its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from math_verify import parse, verify

sympy: Any = importlib.import_module("sympy")  # which has no type hints
_RIGHT, _WRONG = 0, 3
_MEMORY_BYTES = 2 << 30
_WALL_PER_CPU = 20  # a fork that waits uses no CPU seconds: this limit should never be reached
# math-verify compares 6 decimals, and 15 places after the point: 6.63e-34 is 0 to it. So numbers that it calls equal
# must also be equal by size. Numbers above 0.05 that agree in six decimals (1/3 and 0.333333) are.
_RELATIVE = 1e-5
_DIGITS = 30
_ZERO = 1e-100  # sympy's value of an expression that is 0, but not simplified to 0, is below it
_PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))  # how math-verify reads %
# Each makes sympy import or build something that every fork would otherwise repeat.
_WARM_UP = (
    ("\\boxed{\\frac{1}{2}}", "so 0.5"),
    ("\\boxed{(x+1)^2}", "\\boxed{x^2+2x+1}"),
    ("\\boxed{2}", "$\\sqrt{3}$"),
    ("\\boxed{1.5\\times 10^{3}}", "\\boxed{1500}"),
)


def right(answer: str, completion: str) -> bool:
    """Whether math-verify finds both equal. Its own time limits are off; the kernel's limits apply."""
    expected, given = parse(answer, parsing_timeout=None), parse(completion, parsing_timeout=None)
    return bool(verify(expected, given, timeout_seconds=None)) and _of_one_size(expected, given)


def _of_one_size(expected: list[Any], given: list[Any]) -> bool:
    """Whether two real numbers agree by size and sign; 0 agrees only with 0. True for anything else, which math-verify
    decides."""
    ours, theirs = _sizes(expected), _sizes(given)
    if not ours or not theirs:
        return True
    return any(abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) for a in ours for b in theirs)


def _sizes(parsed: list[Any]) -> list[Any]:
    """The parsed number, or that at the end of an equation like x = 5; for 10 % both 0.1 and 10; [] otherwise."""
    value = next((one for one in parsed if not isinstance(one, str)), None)
    while isinstance(value, sympy.Eq):
        value = value.rhs
    if not isinstance(value, sympy.Expr) or not value.is_number:
        return []
    size = value.doit().evalf(_DIGITS)
    if not isinstance(size, sympy.Number) or not size.is_finite:
        return []
    size = size if abs(size) > _ZERO else sympy.Integer(0)
    return [size, 100 * size] if value.has(_PERCENT) else [size]


def judge(answer: str, completion: str, cpu_s: float) -> bool:
    """`right`, in a fork with limits; a verdict that exceeds them is wrong."""
    child = os.fork()
    if child == 0:
        code = _WRONG
        try:
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF and SIGALRM end a process that does not handle them
            signal.setitimer(signal.ITIMER_REAL, _WALL_PER_CPU * cpu_s)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
            code = _RIGHT if right(answer, completion) else _WRONG
        finally:
            os._exit(code)  # any exception means "wrong"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _RIGHT


def main() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    cpu_s = float(sys.argv[1])
    for answer, completion in _WARM_UP:
        right(answer, completion)
    gc.collect()
    gc.freeze()  # forks share these pages
    print("ready", flush=True)
    for line in sys.stdin:
        answer, completion = json.loads(line)
        print("right" if judge(answer, completion, cpu_s) else "wrong", flush=True)


if __name__ == "__main__":
    main()
