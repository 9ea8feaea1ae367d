"""The task `dataset`: rows on disk as problems, shuffled by a seed, each reachable by its index alone.

All rows are read once, at the start, so that a wrong row is reported before anything runs. The model's prompt and the
answer go into a temporary file without a name, and problem `index` is one read from it: memory is 8 bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from common.config import ConfigError
from ops.tasks import Problem, PromptTooLong, SpecialToken, Split
from ops.tasks.origin import Origin
from ops.tasks.rows import Row, column, read_rows
from ops.tasks.verifiers import Verifier, answer_end, gold, rehearse

_ROUNDS = 4
_NAMED = 3  # of the rows left out, this many are named
_ROWS_AT_A_TIME = 256  # tokenized together, which is several times as fast as one by one


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of a data set and how its rows are read. `answer_key` None: rows without answers."""

    path: str
    prompt_key: str
    answer_key: str | None
    max_prompt_length: int
    skip_too_long: bool = False
    skip_special: bool = False
    template_columns: tuple[str, ...] = ()  # columns that go to the chat template in rows that have them
    teacher_key: str | None = None
    teachers: tuple[str, ...] = ()  # names that the column `teacher_key` may have

    @property
    def columns(self) -> frozenset[str] | None:
        """Columns to read of formats that have columns; None: all, where dots may be part of a name."""
        keys = {key for key in (self.prompt_key, self.answer_key, self.teacher_key) if key is not None}
        return None if any("." in key for key in keys) else frozenset(keys)


@dataclass(slots=True, weakref_slot=True)
class _Spool:
    """Records of text, written once, read by number from any place."""

    _file: Any = field(default_factory=tempfile.TemporaryFile)
    _ends: array[int] = field(default_factory=lambda: array("Q", [0]))
    _hash: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def __post_init__(self) -> None:
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, raw: bytes) -> None:
        self._hash.update(b"%d:%b" % (len(raw), raw))
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))

    def done(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())

    def __getitem__(self, number: int) -> list[str]:
        begin, end = self._ends[number], self._ends[number + 1]
        record: list[str] = json.loads(os.pread(self._file.fileno(), end - begin, begin))
        return record


class Render(Protocol):
    """Makes a prompt's text."""

    def __call__(self, value: Any, place: str, columns: Mapping[str, Any]) -> str:
        """The text of a row's value. Raises ConfigError, which names the row's place; SpecialToken."""
        ...

    @property
    def notes(self) -> list[str]:
        """Warnings about the rows rendered so far."""
        ...

    @property
    def template(self) -> str | None:
        """A digest of the chat templates in use; None without any."""
        ...


@dataclass(slots=True)
class UnusedRows:
    """Rows that are not used: their number, and the places of the first."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.rows += 1
        if len(self.first) < _NAMED:
            self.first.append(place)

    def described(self, why: str) -> str:
        """ "3 rows spell a special token and are left out: rows.jsonl, line 2; …" """
        more = "; …" if self.rows > len(self.first) else ""
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'} {why}: {'; '.join(self.first)}{more}"


class Dataset:
    """A data set on disk as a task. The split `train` is shuffled, epoch after epoch; `eval` is in the file's order.

    Raises ConfigError with the error and the place, file or row. PromptTooLong names the row.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        render: Render,
        lengths: Callable[[list[str]], list[int]],
        verifier: Verifier,
    ) -> None:
        """`lengths` counts the tokens of texts."""
        self._layout, self._render, self._lengths, self._verifier = layout, render, lengths, verifier
        self._spool, self._too_long, self._special = _Spool(), UnusedRows(), UnusedRows()
        self.origin = Origin()
        self.by_teacher: Counter[str] = Counter()  # rows in use; empty with one teacher
        rows = read_rows(layout.path, layout.columns, frozenset(layout.template_columns))
        while batch := list(islice(rows, _ROWS_AT_A_TIME)):
            for place, record in self._records(batch):
                raw = json.dumps(record).encode()
                self._spool.add(raw)
                self.origin.add(place, raw)
        self._spool.done()
        if not len(self._spool):
            raise ConfigError(
                f"{layout.path}: there is no row in it"
                + (f" of at most {layout.max_prompt_length} tokens" if self._too_long.rows else "")
                + (" without a special token" if self._special.rows else "")
            )

    def _records(self, rows: list[Row]) -> Iterator[tuple[str, list[str]]]:
        """Place, and prompt, answer and perhaps teacher of each row that is used."""
        layout = self._layout
        used: list[tuple[Row, str]] = []
        for place, row in rows:
            columns = {name: row[name] for name in layout.template_columns if row.get(name) is not None}
            try:
                prompt = self._render(column(row, layout.prompt_key, place), place, columns)
            except SpecialToken:
                if not layout.skip_special:
                    raise
                self._special.add(place)
                continue
            _check_text(prompt, "prompt", place)
            used.append(((place, row), prompt))
        lengths = self._lengths([prompt for _, prompt in used]) if used else []
        for ((place, row), prompt), tokens in zip(used, lengths, strict=True):
            if not tokens:
                raise ConfigError(f"{place}: the prompt has no token")
            if tokens <= layout.max_prompt_length:
                answer = "" if layout.answer_key is None else _answer(row, layout.answer_key, place)
                yield place, [prompt, answer, *self._teacher(row, place)]
            elif layout.skip_too_long:
                self._too_long.add(place)
            else:
                raise PromptTooLong(
                    f"{place}: the prompt has {tokens} tokens, data.max_prompt_length is {layout.max_prompt_length}: "
                    f"raise it, or leave such rows out by data.too_long: skip"
                )

    def _teacher(self, row: dict[str, Any], place: str) -> list[str]:
        """The name of a row's teacher, if there are several. Raises ConfigError."""
        key, known = self._layout.teacher_key, self._layout.teachers
        if key is None:
            return []
        name = column(row, key, place)
        if not isinstance(name, str) or name not in known:
            raise ConfigError(f"{place}: the teacher ({key!r}) is {name!r:.60}; allowed: {', '.join(known)}")
        self.by_teacher[name] += 1
        return [name]

    @property
    def count(self) -> int:
        """Number of rows in use: the problems of one epoch."""
        return len(self._spool)

    @property
    def left_out(self) -> dict[str, int]:
        """Rows that are not used, by reason."""
        return {"too_long": self._too_long.rows, "special_tokens": self._special.rows}

    @property
    def notes(self) -> list[str]:
        """Warnings before anything runs: rows that are left out, data that the template ignores."""
        notes = list(self._render.notes)
        if self._too_long.rows:
            notes.append(self._too_long.described(f"of more than {self._layout.max_prompt_length} tokens left out"))
        if self._special.rows:
            notes.append(self._special.described("left out for a special token in the text"))
        return notes

    @property
    def template(self) -> str | None:
        """A digest of the chat templates in use; None without any."""
        return self._render.template

    @property
    def digest(self) -> str:
        """BLAKE2 of all prompts, answers and names of teachers in use, in their order."""
        return self._spool.digest

    def prepare(self) -> None:
        """Start the verifier, so that it is ready for the first verdict."""
        self._verifier.prepare()

    def rehearse(self) -> None:
        """One verdict with a known result. Raises ConfigError if the verifier does not give it."""
        rehearse(self._verifier)

    def problem(self, index: int, *, split: Split, seed: int) -> Problem:
        """Problem `index`: a function of its arguments and the file alone. Raises ValueError for a negative index."""
        if index < 0:
            raise ValueError(f"index must not be negative, got {index}")
        epoch, place = divmod(index, self.count)
        return Problem(*self._spool[shuffled(place, self.count, f"{seed}:{epoch}") if split == "train" else place])

    def verify(self, problem: Problem, completion: str) -> bool | None:
        """Whether the completion answers the problem; None if there is no verdict."""
        return self._verifier.verify(problem.answer, completion)

    def answer_end(self, problem: Problem, completion: str) -> int | None:
        """The offset just after the final answer; None if there is none."""
        return answer_end(completion)


def shuffled(place: int, count: int, key: str) -> int:
    """The image of `place` in 0 .. count-1 under the permutation of `key`, in constant memory.

    A Feistel network permutes the next power of four; values outside the range go through it again. It uses BLAKE2, not
    a library's generator, whose stream may change with its version: a resumed run must find the same order.
    """
    if not 0 <= place < count:
        raise ValueError(f"need 0 <= place < count, got {place} of {count}")
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = place >> bits, place & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(f"{key}:{number}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        place = left << bits | right
        if place < count:
            return place


def _answer(row: dict[str, Any], key: str, place: str) -> str:
    value = column(row, key, place)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # columns of numbers are often stored as floats: 142.0 is 142
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: the answer ({key!r}) is {type(value).__name__}; allowed: text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: the answer ({key!r}) is {value}; allowed: text or a finite number")
    text = str(value).strip()
    if not gold(text):
        raise ConfigError(f"{place}: the answer ({key!r}) is empty")
    _check_text(text, f"answer ({key!r})", place)
    return text


def _check_text(text: str, what: str, place: str) -> None:
    """JSON can spell half of a character, "\\ud800", which no tokenizer accepts. Raises ConfigError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{place}: the {what} has half a character in it ({error.object[error.start]!r}, a surrogate by itself)"
        ) from error
