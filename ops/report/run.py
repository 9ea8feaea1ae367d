"""A run's folder as the report reads it: every file checked, so that a damaged one is named and not drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError, load
from common.pretrained import ModelError
from common.runfiles.lines import Object, an_object, read_lines
from common.runfiles.records import CONFIG, EVALUATIONS, METRICS, ROLLOUTS, TRACES, WALL, BookLine
from ops.reading.rollouts import find_tokenizer
from ops.report import data
from ops.stats.saving import Saving, length_saving

_SAMPLED_TRACES = 400
_Types = dict[str, Any]
_NUMBER = int | float
_STEP: _Types = {"step": int, "policy_version": int}
_EVALUATION: _Types = {"step": int, "policy_version": int, "k": int, "n": int, "avg@k": _NUMBER, "pass@k": _NUMBER}


@dataclass(frozen=True, slots=True)
class ReportRun:
    """The contents of a run's folder that its report is made of."""

    folder: Path
    config: Config
    lines: list[BookLine]
    steps: list[Object]
    evaluations: list[Object]
    traces: dict[str, data.TraceSample]
    saving: Saving
    wall_s: float | None

    @property
    def generated(self) -> int:
        """Tokens generated in all rollouts on record."""
        return sum(line.tokens_generated for line in self.lines)


def read_run(folder: Path) -> ReportRun:
    """A run's folder in whatever state the run is; files that are not there yet count as empty.

    Raises:
        ConfigError: the folder is no run's (it has no config.yaml), or a file in it is damaged or cannot be read; says
            which line, or why.
    """
    try:
        return _read_run(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def _read_run(folder: Path) -> ReportRun:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no run's folder, there is no config.yaml; expected one like runs/demo")
    lines = list(read_lines(folder / ROLLOUTS, BookLine.from_json))
    try:
        traces = data.sample_traces(folder / TRACES, _SAMPLED_TRACES)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / TRACES}: damaged ({type(error).__name__}: {error})") from error
    return ReportRun(
        folder=folder,
        config=load(folder / CONFIG),
        lines=lines,
        steps=list(read_lines(folder / METRICS, _with(_STEP))),
        evaluations=list(read_lines(folder / EVALUATIONS, _with(_EVALUATION))),
        traces=traces,
        saving=length_saving(lines),
        wall_s=_wall_s(folder / WALL),
    )


def _with(types: _Types) -> Callable[[Any], Object]:
    """A decoder of objects that have these fields of these types."""

    def decode(value: Any) -> Object:
        line = an_object(value)
        for name, wanted in types.items():
            if name not in line:
                raise ValueError(f"{name} is missing")
            if not isinstance(line[name], wanted) or line[name] != line[name]:
                raise ValueError(f"{name} is {line[name]!r:.60}")
        return line

    return decode


def _wall_s(path: Path) -> float | None:
    """Seconds that the run took, over all its sittings; None while it runs for the first time."""
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_bytes())["wall_s"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: damaged, expected an object with wall_s") from error


def find_decoder(run: ReportRun) -> Callable[[list[int]], str] | None:
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
