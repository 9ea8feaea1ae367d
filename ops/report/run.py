"""What the report shows of a run's folder, read once: a damaged file is named and not drawn."""

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
    """The contents of a run's folder that its report is made of."""

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
        """Tokens generated in all rollouts on record."""
        return sum(line.tokens_generated for line in self.lines)

    @property
    def steps_done(self) -> int:
        return self.steps[-1].step if self.steps else 0


def read_run(path: Path) -> ReportRun:
    """A run's folder in whatever state the run is; files that are not there yet count as empty.

    Raises:
        ConfigError: the folder is no run's (it has no config.yaml), or a file in it is damaged or cannot be read; says
            which line, or why.
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
    """Token ids to text; None where no tokenizer is to be had, or nothing to be decoded."""
    if not any(sample.traces for sample in run.traces.values()):
        return None
    try:
        tokenizer = find_tokenizer(run.config, run.folder.path)
    except ModelError:
        return None

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return decode
