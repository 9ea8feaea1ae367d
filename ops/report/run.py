"""The data of a report, read once from a run's folder; a damaged file is an error with its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import Config, ConfigError
from common.pretrained import ModelError
from common.runfiles.records import BookLine, Evaluation, Saving, Step
from common.runfiles.run import RunFolder
from ops.reading.rollouts import find_tokenizer
from ops.report import data
from ops.stats.saving import length_saving

_SAMPLED_TRACES = 400


@dataclass(frozen=True, slots=True)
class ReportRun:
    """The contents of a run's folder that its report shows."""

    folder: RunFolder
    config: Config
    lines: list[BookLine]
    steps: list[Step]
    evaluations: list[Evaluation]
    traces: dict[str, data.TraceSample]
    saving: Saving
    wall_s: float | None

    @property
    def generated(self) -> int:
        """Tokens generated in all booked rollouts."""
        return sum(line.tokens_generated for line in self.lines)

    @property
    def steps_done(self) -> int:
        return self.steps[-1].step if self.steps else 0


def read_run(path: Path) -> ReportRun:
    """Read a run's folder in any state of the run; missing files count as empty.

    Raises:
        ConfigError: not a run's folder (no config.yaml), or a file in it is damaged or unreadable; with the line or
            the reason.
    """
    folder = RunFolder(path)
    try:
        config, lines = folder.config, list(folder.rollouts())
        return ReportRun(
            folder=folder,
            config=config,
            lines=lines,
            steps=list(folder.steps()),
            evaluations=sorted(folder.evaluations(), key=lambda one: one.step),
            traces=data.sample_traces(folder, _SAMPLED_TRACES),
            saving=length_saving(lines),
            wall_s=folder.wall_s,
        )
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def find_decoder(run: ReportRun) -> Callable[[list[int]], str] | None:
    """Turns token ids into text; None if there is no tokenizer, or nothing to decode."""
    if not any(sample.traces for sample in run.traces.values()):
        return None
    try:
        tokenizer = find_tokenizer(run.config, run.folder.path)
    except ModelError:
        return None

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return decode
