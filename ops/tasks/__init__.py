"""The interface of a task: problems by index, and an exact verdict on completions.

No torch and no transformers: the feeder imports this too.
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
    """One problem: the model's prompt, the text that its answer must equal, and which of several teachers is its
    own ('' : there is one)."""

    prompt: str
    answer: str
    teacher: str = ""


class Task(Protocol):
    """A source of problems with a verifier. Every method is a pure function of its arguments."""

    def problem(self, index: int, *, split: Split, seed: int) -> Problem:
        """Return problem `index` (0, 1, ...) of `split`; no prompt is ever in both splits."""
        ...

    def prepare(self) -> None:
        """Start what `verify` needs, if that takes time; otherwise the first verdict waits for it."""
        ...

    def verify(self, problem: Problem, completion: str) -> bool | None:
        """Return whether `completion` answers `problem`; None if there is no verdict."""
        ...

    def answer_end(self, problem: Problem, completion: str) -> int | None:
        """Return the offset, in characters, just after the final answer; None if there is none."""
        ...
