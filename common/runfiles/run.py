"""A run's folder for reading: its files with their records. docs/run-folder.md describes all of them."""

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
    """The folder of a run in any state: every access reads the files as they are now.

    A missing file has no lines, or is None if it holds one record. Raises ConfigError for a damaged file, with its
    name.
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
        """Raises ConfigError, also if this is not a run's folder."""
        if not self.begun:
            raise ConfigError(f"{self.path}: not a run's folder: it has no {names.CONFIG}; expected one like runs/demo")
        return load(self.path / names.CONFIG)

    @property
    def run_key(self) -> str:
        """The run's id. Raises ConfigError, also if it is missing."""
        found = read_json(self.path / names.RUN)
        if not isinstance(found, dict) or not isinstance(found.get("run_key"), str):
            raise ConfigError(f"{self.path / names.RUN}: it has no run_key")
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
        """Duration of the run in seconds, summed over resumes; None during its first session."""
        wall = _read(self.path / names.WALL, Wall)
        return None if wall is None else wall.wall_s

    @property
    def to_evaluate(self) -> list[Path]:
        """The files in `eval/` about weights to evaluate, each a `ToEvaluate`, oldest first."""
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
    """Raises ConfigError if the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
