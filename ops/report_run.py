"""A run's folder as the report reads it: every file checked, so that a damaged one is named and not drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from actors.books import BookLine, read_lines
from common.config import Config, ConfigError, load
from common.pretrained import ModelError
from ops import report_data as data
from ops.reading import find_tokenizer
from ops.summary import Saving, length_saving

_SAMPLED_TRACES = 400
_Types = dict[str, Any]
_NUMBER = int | float
_LATE = frozenset({"admitted_unix_s", "verdict_unix_s", "ended_unix_s", "tokens_trainable"})  # old books lack them
_STEP: _Types = {"step": int, "policy_version": int}
_EVALUATION: _Types = {"step": int, "policy_version": int, "k": int, "n": int, "avg@k": _NUMBER, "pass@k": _NUMBER}


@dataclass(frozen=True, slots=True)
class Run:
    """The contents of a run's folder that its report is made of."""

    folder: Path
    config: Config
    lines: list[data.Line]
    steps: list[data.Line]
    evaluations: list[data.Line]
    traces: dict[str, data.TraceSample]
    saving: Saving
    wall_s: float | None

    @property
    def generated(self) -> int:
        """Tokens generated in all rollouts on record."""
        return sum(line["tokens_generated"] for line in self.lines)


def read_run(folder: Path) -> Run:
    """A run's folder in whatever state the run is; files that are not there yet count as empty.

    Raises:
        ConfigError: the folder is no run's (it has no config.yaml), or a file in it is damaged or cannot be read; says
            which line, or why.
    """
    try:
        return _read_run(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def _read_run(folder: Path) -> Run:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run's folder, there is no config.yaml; expected one like runs/demo")
    lines = _records(folder / "rollouts.jsonl", _book_types())
    try:
        traces = data.sample_traces(folder / "traces.jsonl", _SAMPLED_TRACES)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / 'traces.jsonl'}: damaged ({type(error).__name__}: {error})") from error
    return Run(
        folder=folder,
        config=load(folder / "config.yaml"),
        lines=lines,
        steps=_records(folder / "metrics.jsonl", _STEP),
        evaluations=_records(folder / "eval.jsonl", _EVALUATION),
        traces=traces,
        saving=length_saving(lines),
        wall_s=_wall_s(folder / "wall.json"),
    )


@cache
def _book_types() -> _Types:
    """Fields of a line of the books."""
    hints = get_type_hints(BookLine)
    return {name: hints[name] for name in BookLine.__dataclass_fields__}


def _records(path: Path, types: _Types) -> list[data.Line]:
    """All whole lines of a JSON-lines file, each with these fields of these types. Raises ConfigError."""
    found: list[data.Line] = []
    try:
        for line in read_lines(path):
            _check(line, types)
            found.append(line)
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: line {len(found) + 1} is damaged: {str(error)[:200]}") from error
    return found


def _check(line: Any, types: _Types) -> None:
    """Raises ValueError."""
    if not isinstance(line, dict):
        raise ValueError(f"expected an object, found {type(line).__name__}")
    for name, wanted in types.items():
        if name not in line:
            if name in _LATE:
                continue
            raise ValueError(f"{name} is missing")
        value = line[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
        # JSON has one kind of number: 1 stands for 1.0 as well.
        if not isinstance(value, wanted) and not (type(value) is int and isinstance(0.0, wanted)):
            shown = getattr(wanted, "__name__", str(wanted))
            raise ValueError(f"{name} is {value!r:.60}, expected {shown}")


def _wall_s(path: Path) -> float | None:
    """Seconds that the run took, over all its sittings; None while it runs for the first time."""
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_bytes())["wall_s"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: damaged, expected an object with wall_s") from error


def find_decoder(run: Run) -> Callable[[list[int]], str] | None:
    """Token ids to text; None where no tokenizer is to be had, or nothing to be decoded."""
    if not any(sample.traces for sample in run.traces.values()):
        return None
    try:
        tokenizer = find_tokenizer(run.config, run.folder)
    except ModelError:
        return None

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return decode
