"""Multi-step addition and subtraction, worked out step by step.

    prompt      12+7-3?
    completion  12+7=19;19-3=16#16

Two choices make the single step learnable by models of some hundred thousand parameters, so that the difficulty
is the length of the chain. Every result lies in 10..99, so that all steps are equally wide; and no signed number
occurs twice after the first, so that the one to take next is always the one after that just used.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from ops.tasks import Problem, Split

ALPHABET = "0123456789+-=;#?\n"
"""Every character of a prompt or a completion; the newline stands between problems in running text."""

SMALLEST_RESULT, LARGEST_RESULT = 10, 99
EVAL_PERCENT = 10
"""Share of all prompts that belong to the evaluation split."""

PLAIN, SHIFTED = DIALECTS = ("plain", "shifted")
"""How a chain is written: as above, or with the marks of SHIFTS, "12+7;19#19-3;16=16" after "12+7-3\\n". A model of the
one whose tokens are renamed is a model of the other (`ops.tasks.pretrain.shift`)."""
SHIFTS = {"=": ";", ";": "#", "#": "=", "?": "\n", "\n": "?"}
_INTO_SHIFTED = str.maketrans(SHIFTS)

_INTEGER = re.compile(r"-?[0-9]+")
_TERM = re.compile(r"([+-]?)([0-9]+)")


class Addition(NamedTuple):
    """One line of the chain: `value` and `term` ("+7") make `result`."""

    value: int
    term: str
    result: int

    @property
    def text(self) -> str:
        """The step as it is written: "12+7=19"."""
        return f"{self.value}{self.term}={self.result}"


def split_of(prompt: str) -> Split:
    """Return the split that `prompt` belongs to: by its SHA-256, so the same in every process."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % 100 < EVAL_PERCENT else "train"


def terms_of(prompt: str) -> tuple[int, list[str]]:
    """Return the first number of "12+7-3?" and the signed terms after it: (12, ["+7", "-3"]).

    Raises ValueError if the prompt does not have that form.
    """
    if not re.fullmatch(r"[0-9]+([+-][0-9]+)*\?", prompt):
        raise ValueError(f"not an arithmetic prompt: {prompt!r}")
    first, *rest = _TERM.findall(prompt)
    return int(first[1]), [sign + number for sign, number in rest]


def steps_of(value: int, terms: list[str]) -> list[Addition]:
    """Return the chain that adds `terms` to `value` one after the other."""
    steps = []
    for term in terms:
        steps.append(Addition(value, term, value + int(term)))
        value = steps[-1].result
    return steps


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Problems of `min_numbers` to `max_numbers` numbers: one of 10 to `max_first`, then 1 to `max_value`.

    After the first, each number occurs at most once with each sign. The defaults are the sizes that the shipped
    models are made for. Of `shifted_percent` of the problems the dialect is SHIFTED, and each then names its dialect as
    its teacher. Raises ValueError for sizes that allow no problem.
    """

    min_numbers: int = 12
    max_numbers: int = 15
    max_first: int = 49
    max_value: int = 9
    shifted_percent: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.min_numbers <= self.max_numbers:
            raise ValueError(f"need 2 <= min_numbers <= max_numbers, got {self}")
        if not SMALLEST_RESULT <= self.max_first <= LARGEST_RESULT:
            raise ValueError(f"need {SMALLEST_RESULT} <= max_first <= {LARGEST_RESULT}, got {self}")
        # Up to 40 one sign or the other always keeps a result in 10..99.
        if not self.max_numbers - 1 <= 2 * self.max_value <= 80:
            raise ValueError(f"need max_numbers - 1 <= 2 max_value <= 80, got {self}")
        if not 0 <= self.shifted_percent <= 100:
            raise ValueError(f"need 0 <= shifted_percent <= 100, got {self}")

    @property
    def max_prompt_length(self) -> int:
        """The longest prompt, in characters."""
        return (self.max_numbers - 1) * (len(str(self.max_value)) + 1) + len(f"{self.max_first}?")

    def prepare(self) -> None:
        """Nothing to start."""

    def problem(self, index: int, *, split: Split, seed: int) -> Problem:
        """Return problem `index` of `split`; different indices may, rarely, hold the same prompt.

        Raises ValueError for a negative index.
        """
        if index < 0:
            raise ValueError(f"index must not be negative, got {index}")
        # A string seeds through SHA-512: the same numbers in every process, for any PYTHONHASHSEED.
        rng = random.Random(f"{seed}:{split}:{index}")
        while True:
            problem = self.draw(rng)
            if split_of(problem.prompt) == split:
                return self._in_dialect(problem, rng) if self.shifted_percent else problem

    def _in_dialect(self, problem: Problem, rng: random.Random) -> Problem:
        if rng.randrange(100) >= self.shifted_percent:
            return replace(problem, teacher=PLAIN)
        return Problem(shifted(problem.prompt), problem.answer, SHIFTED)

    def draw(self, rng: random.Random) -> Problem:
        """Draw a problem of either split."""
        count = rng.randint(self.min_numbers, self.max_numbers)
        while True:
            changes = [sign * number for number in range(1, self.max_value + 1) for sign in (1, -1)]
            first = value = rng.randint(SMALLEST_RESULT, self.max_first)
            taken: list[int] = []
            while len(taken) < count - 1:
                fitting = [change for change in changes if SMALLEST_RESULT <= value + change <= LARGEST_RESULT]
                if not fitting:
                    break  # all remaining terms lead out of the range: draw again
                taken.append(rng.choice(fitting))
                changes.remove(taken[-1])
                value += taken[-1]
            else:
                prompt = str(first) + "".join(f"{change:+d}" for change in taken)
                return Problem(prompt=f"{prompt}?", answer=str(value))

    def verify(self, problem: Problem, completion: str) -> bool:
        """Return whether the integer after the first "#" is the answer, as text ("016" is not "16"); in the other
        dialect after the first "=".

        The chain need not be right, and text after the integer does not matter: a base model that
        continues after a right answer has still given it.
        """
        end = self.answer_end(problem, completion)
        return end is not None and completion[completion.index(_mark(problem)) + 1 : end] == problem.answer

    def answer_end(self, problem: Problem, completion: str) -> int | None:
        """Return the offset just after the integer that follows the first "#", in the other dialect the first "=";
        None if there is none."""
        mark_at = completion.find(_mark(problem))
        if mark_at < 0:
            return None
        match = _INTEGER.match(completion, mark_at + 1)
        return match.end() if match else None


def shifted(text: str) -> str:
    """A text of the dialect PLAIN in the dialect SHIFTED."""
    return text.translate(_INTO_SHIFTED)


def _mark(problem: Problem) -> str:
    """The mark in front of an answer."""
    return SHIFTS["#"] if problem.teacher == SHIFTED else "#"
