"""What a task is: problems by index, and an exact judgement of what was written.

Free of torch and transformers: the process that only feeds prompts imports this too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from common.config import ConfigError

Split = Literal["train", "eval"]


class PromptTooLong(ConfigError):
    """A prompt of more than data.max_prompt_length tokens."""


class SpecialToken(ConfigError):
    """A row of a chat that spells a special token."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: the text a model is shown, and the text its answer must equal."""

    prompt: str
    answer: str


class Task(Protocol):
    """A source of problems with a verifier. Every method is a pure function of its arguments."""

    def problem(self, index: int, *, split: Split, seed: int) -> Problem:
        """Return problem `index` (0, 1, ...) of `split`; no prompt is ever in both splits."""
        ...

    def prepare(self) -> None:
        """Start what `verify` needs, where that takes time; without it, the first verdict waits for it."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool | None:
        """Return whether `completion` answers `problem`; None where nothing can tell."""
        ...

    def answer_end(self, problem: Problem, completion: str) -> int | None:
        """Return the offset, in characters, just behind the final answer; None where there is none."""
        ...
