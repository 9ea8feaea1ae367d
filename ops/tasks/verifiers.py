"""Verifiers of completions: `exact` (equal text), `math-verify` (equal mathematics), `none`.

A model may write anything, and comparing mathematics can take for ever: 9^{9^{9^9}}. math-verify's own
time limit is Python's alarm, which only works in a main thread and does not interrupt one long operation of C. So it
runs in its own process (`ops/tasks/math_judge.py`) that forks for every verdict: the kernel kills the fork when
its CPU seconds or its memory are used up, and the answer then is "wrong". CPU seconds, so that a verdict
does not depend on the load.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import subprocess
import sys
import time
import weakref
from typing import Protocol

from common.config import ConfigError
from common.pretrained import PACKAGE_ROOT
from ops.tasks.rows import require

log = logging.getLogger("katana.verify")

READ_CHARACTERS = 2000
"""Most characters of a completion that math-verify gets."""
CPU_S, START_S, ANSWER_S = 2.0, 120.0, 60.0
_LONGEST_NUMBER = 100  # characters; longer text is not searched for numbers like 4.5e33
_E_NOTATION = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[eE]([+-]?[0-9]+)")
_THIN_SPACE = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")  # 70\,000
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace does not count
_HASHES = re.compile(r"(?<!#)####[^\S\n#]*+([^\n#]*[^\s#])")
_THOUGHT = "</think>"
_COMMAND = ("python", "-m", "ops.tasks.math_judge")


class Verifier(Protocol):
    def prepare(self) -> None:
        """Start what judging needs, without waiting for it."""
        ...

    def verify(self, answer: str, completion: str) -> bool | None:
        """Whether a completion gives the answer; None if there is no verdict."""
        ...


def last_boxed(text: str) -> tuple[int, int] | None:
    r"""Begin and end of the content of the last closed \boxed{}; None without one. One pass."""
    opened: list[int] = []  # where the content of each open brace begins; negative if it is not a box
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] == "}" and opened:
            begin = opened.pop()
            if begin > (last[0] if last else -1):
                last = begin, match.start()
        elif match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if match[0] != "{" else -1)
    return last


def final_answer(text: str) -> tuple[int, int] | None:
    r"""Begin and end of the final answer: inside the last \boxed{}, or after the last #### (as in GSM8K)."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = [match.span(1) for match in _HASHES.finditer(text)]
    return hashes[-1] if hashes else None


def answer_end(text: str) -> int | None:
    """The offset just after the final answer, its brace included; None if there is none."""
    found = final_answer(text)
    return None if found is None else found[1] + (text[found[1] : found[1] + 1] == "}")


def gold(text: str) -> str:
    r"""The answer alone: from a worked solution the boxed part or the text after ####; without $."""
    found = final_answer(text)
    answer = (text[slice(*found)] if found else text).strip()
    bare = answer.strip("$")
    return answer if "$" in bare or not (answer[:1] == answer[-1:] == "$") else bare.strip()


def after_thought(completion: str) -> str:
    r"""The text after the last </think>, since a \boxed{} in a thought is not an answer; else the whole text."""
    rest = completion.rpartition(_THOUGHT)[2]
    return rest if rest.strip() else completion


def excerpt(completion: str) -> str:
    r"""The part of a completion that math-verify gets: its last \boxed{}, else its end; at most READ_CHARACTERS.

    Only one box: math-verify reads several boxes as one set, and so "\boxed{3}, no, \boxed{4}" as wrong.
    """
    answer = after_thought(completion)
    boxed = last_boxed(answer)
    return (answer if boxed is None else in_box(answer[slice(*boxed)]))[-READ_CHARACTERS:]


def in_box(answer: str) -> str:
    r"""An answer as LaTeX in a box, the only form that math-verify reads completely.

    A comma or full stop after it is removed, 4.5e33 becomes a power of ten and 70\,000 one number: math-verify misreads
    all of them.
    """
    text = answer.strip()
    bare = text.rstrip(".,").rstrip()
    text = text if bare.endswith("\\") else bare  # "\," is a space
    power = _E_NOTATION.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if power:
        text = f"{power[1]}\\times 10^{{{int(power[2])}}}"
    return f"\\boxed{{{_THIN_SPACE.sub('', text)}}}"


class NoVerifier:
    """The verifier `none`."""

    def prepare(self) -> None:
        pass

    def verify(self, answer: str, completion: str) -> bool | None:
        return None


class Exact:
    """Equal text: the completion's final answer, or all of it if there is none, read in the same way as the answer."""

    def prepare(self) -> None:
        pass

    def verify(self, answer: str, completion: str) -> bool | None:
        return gold(after_thought(completion)) == gold(answer)


class MathVerify:
    """The package math-verify, in another process. Raises ConfigError if it is not installed."""

    def __init__(self, cpu_s: float = CPU_S, answer_s: float = ANSWER_S) -> None:
        require("math_verify", "math", wanted_by="data.verifier math-verify")
        self._cpu_s, self._answer_s = cpu_s, answer_s
        self._judge: subprocess.Popen[bytes] | None = None
        self._ready = False

    def prepare(self) -> None:
        """Start the judge, which needs seconds for its imports."""
        if self._judge is not None:
            return
        command = [sys.executable, *_COMMAND[1:], str(self._cpu_s)]
        # A session of its own: Ctrl-C is the feeder's, and the end of its input is the judge's end.
        self._judge = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PACKAGE_ROOT, start_new_session=True, bufsize=0
        )
        self._ready = False
        weakref.finalize(self, _end, self._judge)

    def verify(self, answer: str, completion: str) -> bool | None:
        r"""Whether both are the same mathematics; the last \boxed{} counts, else the last expression or number.

        None, with a warning, if the judge itself does not answer; it is restarted for the next. Raises
        ConfigError if it ends by itself before it can judge anything: it would do so every time.
        """
        try:
            self.prepare()
            self._await_start()
            self._send(json.dumps([in_box(gold(answer)), excerpt(completion)]).encode() + b"\n")
            return self._line(self._answer_s) == b"right"
        except OSError as error:
            log.warning("math-verify's judge gave no verdict, which stays open: %s", error)
            self._give_up()
            return None

    def _await_start(self) -> None:
        """Raises ConfigError, OSError."""
        if self._ready:
            return
        assert self._judge is not None
        try:
            self._ready = self._line(START_S) == b"ready"
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._judge.wait(timeout=1.0)
            code = self._judge.returncode
            if code is None or code < 0:  # slow, or killed: by a lack of memory, for example
                raise
            self._give_up()
            raise ConfigError(
                f"data.verifier math-verify: its judge ends at its start (exit code {code}), so nothing can be judged; "
                f"`{' '.join(_COMMAND)} {self._cpu_s:g}` says why"
            ) from None
        if not self._ready:
            raise OSError("it does not start")

    def _give_up(self) -> None:
        if self._judge is not None:
            _end(self._judge)
        self._judge = None

    def _send(self, raw: bytes) -> None:
        assert self._judge is not None and self._judge.stdin is not None
        while raw:
            raw = raw[self._judge.stdin.write(raw) :]

    def _line(self, within_s: float) -> bytes:
        """One line from the judge. Raises OSError if it has ended or takes too long."""
        assert self._judge is not None and self._judge.stdout is not None
        output, line, deadline = self._judge.stdout.fileno(), b"", time.monotonic() + within_s
        while not line.endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise OSError(f"nothing came within {within_s:g} s")
            part = os.read(output, 64)
            if not part:
                raise OSError("it has ended")
            line += part
        return line.strip()


def _end(judge: subprocess.Popen[bytes]) -> None:
    """Closing its input ends the judge; if it does not end, it is killed."""
    for pipe in (judge.stdin, judge.stdout):
        if pipe is not None:
            pipe.close()
    try:
        judge.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        judge.kill()
        judge.wait()


VERIFIERS: dict[str, type[NoVerifier] | type[Exact] | type[MathVerify]] = {
    "none": NoVerifier,
    "exact": Exact,
    "math-verify": MathVerify,
}
_SHARED: weakref.WeakValueDictionary[str, Verifier] = weakref.WeakValueDictionary()


def find_verifier(name: str) -> Verifier:
    """A verifier, shared within the process: one judge takes some 90 MB. Raises ConfigError."""
    return _SHARED.setdefault(name, VERIFIERS[name]())


def rehearse(verifier: Verifier) -> None:
    """One verdict with a known result. Raises ConfigError if the verifier does not give it."""
    if isinstance(verifier, NoVerifier):
        return
    verdict = verifier.verify("1", "\\boxed{1}")
    if verdict is not True:
        result = "gives no verdict" if verdict is None else "says that 1 is not 1"
        raise ConfigError(f"data.verifier: {type(verifier).__name__} {result}; look at its package, or at its log")
