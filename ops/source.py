"""Prompts for the feeder and the evaluator: a task, a tokenizer, a seed. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.config import Config, ConfigError
from common.messages import Ints
from common.pretrained import find_model, load_tokenizer, read_facts
from ops.tasks import Problem, Split, Task
from ops.tasks.arithmetic import Arithmetic

TASKS: dict[str, type[Any]] = {"arithmetic": Arithmetic}


class PromptTooLong(ConfigError):
    """A prompt of more than data.max_prompt_length tokens."""


def make_task(config: Config) -> Task:
    """The task that `data` names. Raises ConfigError for an unknown one or options that it does not take."""
    data = config.data
    if data.task not in TASKS:
        raise ConfigError(f"data.task: {data.task!r} is not known; known tasks: {', '.join(sorted(TASKS))}")
    try:
        task: Task = TASKS[data.task](**data.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.options of task {data.task!r}: {error}") from error
    return task


class TaskSource:
    """Token ids of a task's problems, and its verdict on completions (`actors.feeder.Source`)."""

    def __init__(self, config: Config, split: Split = "train") -> None:
        self._task, self._split, self._seed = make_task(config), split, config.seed
        self._limit = config.data.max_prompt_length
        folder = find_model(config.student.model, weights=False)
        self.tokenizer = load_tokenizer(folder)
        teacher = find_model(config.teacher.model, weights=False)
        self._stops = set(read_facts(folder).stop_ids) | set(read_facts(teacher).stop_ids)

    def problem(self, index: int) -> Problem:
        """Problem `index` of the split."""
        return self._task.problem(index, split=self._split, seed=self._seed)

    def prompt(self, problem: int) -> Ints:
        """Token ids, int32 [m]. Raises PromptTooLong."""
        text = self.problem(problem).prompt
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self._limit:
            raise PromptTooLong(
                f"problem {problem} of split {self._split!r}: the prompt has {len(ids)} tokens, "
                f"data.max_prompt_length is {self._limit}: {text!r:.120}"
            )
        if not ids:
            raise ConfigError(f"problem {problem} of split {self._split!r}: the prompt is empty")
        return np.asarray(ids, dtype=np.int32)

    def text(self, tokens: Ints) -> str:
        """The completion's text, up to the first stop token."""
        ids = [int(token) for token in tokens]
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        text: str = self.tokenizer.decode(ids[:end])
        return text

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        """Whether a completion is right."""
        return self._task.verify(self.problem(problem), self.text(tokens))
