"""A run's folder as everyone reads it: its files, each with its records. docs/run-folder.md describes them all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from common.config import Config, ConfigError, load
from common.runfiles import names
from common.runfiles.fields import Record
from common.runfiles.lines import BROKEN, Lines, why_of
from common.runfiles.records import Audit, BookLine, Evaluation, Ledger, Step, Summary, Trace, Trained, Wall

R = TypeVar("R", bound=Record)


class RunFolder:
    """The folder of a run in whatever state it is: every look reads the files as they are now.

    A file that is not there yet has no lines, and is None where it holds one record. Raises ConfigError for a damaged
    one, with its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rollouts = Lines(path / names.ROLLOUTS, BookLine)
        self.traces = Lines(path / names.TRACES, Trace)
        self.audits = Lines(path / names.AUDIT, Audit)
        self.steps = Lines(path / names.METRICS, Step)
        self.trained = Lines(path / names.TRAINED, Trained)
        self.evaluations = Lines(path / names.EVALUATIONS, Evaluation)

    @property
    def begun(self) -> bool:
        """Whether it is a run's folder."""
        return (self.path / names.CONFIG).is_file()

    @property
    def config(self) -> Config:
        """Raises ConfigError, also where the folder is no run's."""
        if not self.begun:
            raise ConfigError(f"{self.path}: no run's folder, there is no {names.CONFIG}; expected one like runs/demo")
        return load(self.path / names.CONFIG)

    @property
    def run_key(self) -> str:
        """The run's id. Raises ConfigError also where it is not there."""
        found = read_json(self.path / names.RUN)
        if not isinstance(found, dict) or not isinstance(found.get("run_key"), str):
            raise ConfigError(f"{self.path / names.RUN}: no run_key in it")
        run_key: str = found["run_key"]
        return run_key

    @property
    def ledger(self) -> Ledger | None:
        return _read(self.path / names.LEDGER, Ledger)

    @property
    def summary(self) -> Summary | None:
        return _read(self.path / names.SUMMARY, Summary)

    @property
    def wall_s(self) -> float | None:
        """Seconds that the run took, over all its sittings; None while it runs for the first time."""
        wall = _read(self.path / names.WALL, Wall)
        return None if wall is None else wall.wall_s

    @property
    def to_evaluate(self) -> list[Path]:
        """The files that say which weights wait for the evaluator, each a `ToEvaluate`, oldest first."""
        return sorted((self.path / names.TO_EVALUATE).glob("v*.json"))


def _read(path: Path, kind: type[R]) -> R | None:
    try:
        return kind.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, *BROKEN) as error:
        raise ConfigError(
            f"{path}: damaged ({why_of(error)}); expected the {kind.__name__.lower()} of a run"
        ) from error


def read_json(path: Path) -> Any:
    """Raises ConfigError when the file is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
