"""Prompts for the feeder and the evaluator: a task, a tokenizer, a seed. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.config import Benchmark, Config, ConfigError, Data
from common.files import write_atomically, write_json
from common.pretrained import ModelError, find_model, load_tokenizer, read_facts, text_of
from common.runfiles.making import versions
from common.runfiles.names import DATA_ROWS, RUN
from common.runfiles.run import read_json
from common.wire.messages import Ints
from ops.tasks import Problem, PromptTooLong, Split, Task
from ops.tasks.arithmetic import DIALECTS, Arithmetic
from ops.tasks.dataset import Dataset, Layout
from ops.tasks.origin import differences
from ops.tasks.verifiers import find_verifier

# All keys of `data` except the number of generations and the sizes of built-in tasks.
_MAKE_PROMPTS = frozenset(Data.model_fields) - {"task", "options", "num_generations"}
_RENDERS = {"transformers": "transformers", "katana": "Katana", "commit": "Katana's commit"}
TASKS: dict[str, type[Any]] = {"arithmetic": Arithmetic}


def make_task(config: Config, tokenizer: Any = None, benchmark: str | None = None) -> Task:
    """The task of `data`, or the benchmark of `eval.data`. `tokenizer`: the student's; None: it is loaded.

    Raises ConfigError for an unknown task, options that it does not accept, or data that cannot be used.
    """
    data = config.data
    if data.task == "dataset":
        return _dataset(config, tokenizer or load_tokenizer(find_model(config.student.model, weights=False)), benchmark)
    if data.task not in TASKS:
        raise ConfigError(
            f"data.task: {data.task!r} is not known; known tasks: {', '.join(sorted([*TASKS, 'dataset']))}"
        )
    try:
        task: Task = TASKS[data.task](**data.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.options of task {data.task!r}: {error}") from error
    _check_dialects(config, task)
    return task


def _check_dialects(config: Config, task: Task) -> None:
    """Raises ConfigError unless a built-in task names the teachers that the config has."""
    several = isinstance(task, Arithmetic) and task.shifted_percent > 0
    if config.teachers and not (several and config.data.teacher_key == "dialect"):
        raise ConfigError(
            f"data.teacher_key: {config.data.teacher_key!r} of the task {config.data.task!r} names no teacher; "
            f"allowed: 'dialect' of the task 'arithmetic' with data.options.shifted_percent above 0"
        )
    if several and set(config.teachers) != set(DIALECTS):
        raise ConfigError(
            f"data.options.shifted_percent: the problems name the teachers {', '.join(DIALECTS)}; "
            f"teachers has {', '.join(config.teachers) or 'none'}"
        )


def _dataset(config: Config, tokenizer: Any, benchmark: str | None) -> Dataset:
    from ops.tasks.prompts import Renderer  # Jinja: only here

    data = config.data
    if benchmark is None:
        assert data.path is not None  # the config's own check
        where = Benchmark(path=data.path)
    else:
        where = config.eval.data[benchmark]
    layout = Layout(
        where.path,
        where.prompt_key or data.prompt_key,
        None if data.verifier == "none" else where.answer_key or data.answer_key,
        data.max_prompt_length,
        skip_too_long=data.too_long == "skip",
        skip_special=data.special_tokens == "skip",
        template_columns=tuple(data.template_columns) if data.chat else (),
        teacher_key=data.teacher_key if benchmark is None else None,
        teachers=tuple(config.teachers),
    )
    return Dataset(
        layout,
        render=Renderer(tokenizer, data),
        lengths=Encoder(tokenizer, chat=data.chat).lengths,
        verifier=find_verifier(data.verifier),
    )


class Encoder:
    """Token ids of prompts' texts: with the tokens that the tokenizer puts before a text (BOS), never those after it.

    Chats get neither: their template writes all special tokens.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self._tokenizer = tokenizer
        self._leading_ids = [] if chat else _leading_ids(tokenizer)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Raises ModelError."""
        found: list[list[int]] = _encoded(self._tokenizer, texts, add_special_tokens=False)
        front = self._leading_ids
        return [ids if ids[: len(front)] == front else front + ids for ids in found]

    def lengths(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(ids) for ids in self(texts)]


def _encoded(tokenizer: Any, text: str | list[str], **how: Any) -> Any:
    """`input_ids`. Raises ModelError: a tokenizer without a token for unknown text refuses by an error of its own."""
    try:
        return tokenizer(text, **how)["input_ids"]
    except Exception as error:
        if not isinstance(text, str):
            for one in text:  # which of them it is
                _encoded(tokenizer, one, **how)
        raise ModelError(f"the student's tokenizer cannot encode {text!r:.200} ({error})") from error


def _leading_ids(tokenizer: Any) -> list[int]:
    bare: list[int] = _encoded(tokenizer, "1", add_special_tokens=False)
    whole: list[int] = _encoded(tokenizer, "1")
    starts = (start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare)
    return whole[: next(starts, 0)]


class TaskSource:
    """Token ids of a task's problems, and its verdicts on completions (`actors.feeder.Source`)."""

    def __init__(self, config: Config, split: Split = "train", benchmark: str | None = None) -> None:
        self._split, self._seed = split, config.seed
        self._limit = config.data.max_prompt_length
        self._data, self._student = config.data, config.student.model
        folder = find_model(config.student.model, weights=False)
        self.tokenizer = load_tokenizer(folder)
        self._encode = Encoder(self.tokenizer, chat=config.data.chat)
        self._task = make_task(config, self.tokenizer, benchmark)
        self._stops = set(read_facts(folder).stop_ids)
        if config.rollout.stop_set == "union":  # else the writer continues after the teachers'
            for teacher in config.all_teachers.values():
                self._stops |= set(read_facts(find_model(teacher.model, weights=False)).stop_ids)

    def prepare(self) -> None:
        """Start the verifier; a process that will judge calls this first."""
        self._task.prepare()

    def rehearse(self) -> None:
        """One verdict with a known result, for a data set's verifier. Raises ConfigError if it is not given."""
        if isinstance(self._task, Dataset):
            self._task.rehearse()

    def note_data(self, folder: Path) -> None:
        """Record in a run's run.json (and, by row, in data.rows) which rows it uses; nothing for a task without rows.

        Raises ConfigError with the differences if other rows are recorded: the resumed run would mix two data sets.
        """
        if not isinstance(self._task, Dataset):
            return
        noted = read_json(folder / RUN)
        found = self._record(self._task)
        before = noted.get("data", found)
        if not isinstance(before, dict):
            raise ConfigError(f"{folder / RUN}: data is {type(before).__name__}, not a run's record of its data")
        if any(before.get(name) != found[name] for name in ("rows", "digest")):
            raise ConfigError(self._changed(self._task, noted, found, folder))
        if "files" not in noted.get("data", {}):  # the first start, or a folder of before there were any
            write_atomically(folder / DATA_ROWS, self._task.origin.write)
            write_json(folder / RUN, noted | {"data": found})

    def _record(self, task: Dataset) -> dict[str, Any]:
        """Rows and digest decide; everything else is only for the message about what has changed."""
        keys = {f"data.{name}": value for name, value in self._data.model_dump().items() if name in _MAKE_PROMPTS}
        return {
            "rows": task.count,
            "digest": task.digest,
            "files": task.origin.files,
            "left_out": task.left_out,
            "template": task.template,
            "keys": {"student.model": self._student, **keys},
        }

    def _changed(self, task: Dataset, noted: dict[str, Any], found: dict[str, Any], folder: Path) -> str:
        before = noted["data"]
        changes = differences(before, found)
        if first := task.origin.first_difference(folder / DATA_ROWS):
            changes.append(first)
        if "files" not in before:
            changes.append("this folder of an older version does not record what differs")
        # The same files through the same template: then another version renders them, or the template writes a date.
        was, now = noted.get("versions", {}), versions()
        changes += [
            f"{what} was {was[name]}, now {now[name]}"
            for name, what in _RENDERS.items()
            if was.get(name, now[name]) != now[name]
        ]
        changes += [note for note in task.notes if "date" in note]
        return (
            f"data.path: prompts or answers are not those that this run began with ({before.get('rows')} rows, now "
            f"{found['rows']}; {folder / RUN}): {'; '.join(changes)}. Put the former data back, or begin a run of "
            f"another name"
        )

    @property
    def count(self) -> int | None:
        """Number of rows of a data set; None for a task with unlimited problems."""
        return self._task.count if isinstance(self._task, Dataset) else None

    @property
    def skipped(self) -> int:
        """Number of rows of a data set that were left out."""
        return sum(self._task.left_out.values()) if isinstance(self._task, Dataset) else 0

    @property
    def notes(self) -> list[str]:
        """Warnings about a data set before it is used; the caller reports them once."""
        return self._task.notes if isinstance(self._task, Dataset) else []

    def problem(self, index: int) -> Problem:
        """Problem `index` of the split."""
        return self._task.problem(index, split=self._split, seed=self._seed)

    def prompt(self, problem: int) -> Ints:
        """Token ids, int32 [m]. Raises PromptTooLong."""
        text = self.problem(problem).prompt
        [ids] = self._encode([text])
        if len(ids) > self._limit:
            raise PromptTooLong(
                f"problem {problem} of split {self._split!r}: the prompt has {len(ids)} tokens, "
                f"data.max_prompt_length is {self._limit}: {text!r:.120}"
            )
        if not ids:
            raise ConfigError(f"problem {problem} of split {self._split!r}: the prompt is empty")
        return np.asarray(ids, dtype=np.int32)

    def teacher(self, problem: int) -> str:
        """The name of a problem's teacher; '' if there is one."""
        return self.problem(problem).teacher

    @property
    def by_teacher(self) -> dict[str, int]:
        """Number of rows of a data set for each of several teachers; empty with one, and for a task without rows."""
        return dict(self._task.by_teacher) if isinstance(self._task, Dataset) else {}

    def text(self, tokens: Ints) -> str:
        """The completion's text, up to the first stop token."""
        ids = [int(token) for token in tokens]
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        return text_of(self.tokenizer, ids[:end])

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        """Whether a completion is right; None if there is no verdict."""
        return self._task.verify(self.problem(problem), self.text(tokens))

    def answer_end(self, problem: int, completion: str) -> int | None:
        """The offset just after the answer in a completion's text; None if there is none."""
        return self._task.answer_end(self.problem(problem), completion)
