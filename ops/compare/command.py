"""`katana compare`: the same experiment under several policies and seeds, run cell by cell, then tables and plots.

The same command again continues where it stopped: finished cells are kept, unfinished ones are resumed, and one
with another config than requested now is refused. A failed cell does not stop the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.config import Config, ConfigError
from common.files import write_text
from common.policies import check_policy
from common.runfiles.making import lock
from common.runfiles.names import CONFIG
from ops.compare import grid as grids
from ops.compare.axes import crossed, read_axes
from ops.compare.data import FIGURES, CellResult, read_result
from ops.compare.grid import Cell, Grid, source_of
from ops.compare.runs import Interrupts, Process, last_words, run_cells, start_run
from ops.run.local import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from ops.stats import endings


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for, as text."""

    policies: str
    variants: Sequence[str]
    seeds: str
    budget: str
    overrides: Sequence[str] = ()  # in the config already
    jobs: int = 1
    folder: Path = Path()  # of the config, where files of custom policies are looked for
    losses: str = ""
    sweeps: Sequence[str] = ()


def grid_folder(config: Config, name: str | None) -> Path:
    """Where the grid of an experiment lies; without a name it is called after the experiment."""
    return Path(config.runs_dir) / (name or f"{config.name[:56]}-compare")


def compare(base: Config, name: str | None, request: Request) -> int:
    """Run what is not done yet, then report; returns the exit code.

    Raises ConfigError before anything is started: a request that cannot be read, a config that cannot be run, a folder
    that holds something else.
    """
    folder = grid_folder(base, name)
    tokens = grids.read_budget(request.budget)
    if tokens is not None and any(item.partition("=")[0].strip() == "learner.max_steps" for item in request.overrides):
        raise ConfigError("--set learner.max_steps: with --budget tokens:N it is the tokens that end a run")
    grids.check_base(base, tokens)
    named = grids.read_rows(request.policies, request.variants, request.folder)
    rows, added = grids.with_source_of_match(crossed(named, read_axes(request.losses, request.sweeps)))
    asked = Grid(rows, grids.read_seeds(request.seeds), request.budget)
    _, work, todo = _planned(folder, base, asked, tokens)
    work.check_rows(todo)

    held = _hold(folder)
    try:
        # Once more: what was there before the folder was held may have grown meanwhile.
        grid, work, todo = _planned(folder, base, asked, tokens)
        grids.write_grid(folder, grid)
        for label in added:
            print(f"{label} is made from {source_of(label)} of the same seed: row {source_of(label)} added")
        failed = work.run(todo, total=len(rows) * len(asked.seeds), jobs=request.jobs)
        if failed is None:
            print(f"stopped in {folder}. Continue with the same command", file=sys.stderr)
            return EXIT_INTERRUPTED
        report(folder)
    finally:
        held.close()
    for cell, why in failed.items():
        print(f"failed: {cell.name}: {why}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_OK


def _planned(folder: Path, base: Config, asked: Grid, tokens: int | None) -> tuple[Grid, Work, list[Cell]]:
    """The whole grid, its cells' configs, and which of those asked for are to do. Raises ConfigError, nothing written:
    what is there already is not the same experiment."""
    grid = grids.joined(folder, asked)
    labels = {row.label for row in asked.rows}
    configs = {row.label: grids.row_config(base, row, tokens) for row in grid.rows}
    for label in labels:  # of a row that is not run now, a custom policy is not imported
        check_policy(configs[label], source=f"row {label!r}")
    work = Work(folder, configs)
    work.check_there(grid)
    return grid, work, work.todo(asked)


def _hold(folder: Path) -> IO[str]:
    """Make the folder and hold it. Raises ConfigError where it cannot be made, or another comparison holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made or written to ({error.strerror}); check runs_dir") from error
    except ConfigError as error:
        raise ConfigError(f"{folder}: another `katana compare` is running in this folder") from error


def report(folder: Path) -> int:
    """Make tables and plots from the folder alone, print them; returns the exit code. Raises ConfigError."""
    from ops.compare.report import NAMES, write_report  # matplotlib: only here

    print("\n" + write_report(folder))
    print(f"folder: {folder} ({', '.join(NAMES)})", flush=True)
    return EXIT_OK


class Work:
    """The cells of one call, from their rows' configs."""

    def __init__(self, folder: Path, rows: dict[str, Config]) -> None:
        self._folder, self._rows = folder, rows
        self._began: dict[Cell, float] = {}
        self._left = 0
        self._total = 0
        self._failed: dict[Cell, str] = {}

    def check_there(self, grid: Grid) -> None:
        """Raises ConfigError where a cell that is there, asked for now or not, was begun with another config."""
        for cell in grid.cells():
            if grids.state_of(self._folder / cell.name) != "new":
                grids.check_cell(self._rows[cell.label], cell, self._folder)

    def todo(self, asked: Grid) -> list[Cell]:
        """Cells that are not done, in order."""
        return [cell for cell in asked.cells() if grids.state_of(self._folder / cell.name) != "done"]

    def check_rows(self, todo: Sequence[Cell]) -> None:
        """Models, data and memory of every row that has work to do. Raises ConfigError."""
        from ops.run.check import check  # tokenizers: only where something is run

        for label in dict.fromkeys(cell.label for cell in todo):
            found = check(self._rows[label])
            for problem in [*found.problems, *found.unchecked]:
                raise ConfigError(f"row {label!r}: {problem}")
            source = source_of(label)
            if source is not None:
                _check_can_be_matched(label, source, self._rows[source])

    def run(self, todo: Sequence[Cell], *, total: int, jobs: int) -> dict[Cell, str] | None:
        """Run the cells; returns those that failed, and why, or None when interrupted."""
        self._left, self._total = len(todo), total
        print(f"{total} runs in {self._folder}: {total - len(todo)} done already, {len(todo)} to do", flush=True)
        for name in ("configs", "logs"):
            (self._folder / name).mkdir(exist_ok=True)
        interrupts = Interrupts()
        with interrupts.watched():
            run_cells(todo, jobs=jobs, begin=self._begin, ended=self._ended, interrupts=interrupts)
        return None if interrupts.count else self._failed

    def _config(self, cell: Cell) -> Config:
        return grids.cell_config(self._rows[cell.label], cell, self._folder)

    def _begin(self, cell: Cell) -> Process:
        run = self._folder / cell.name
        config = self._config(cell)
        resume = grids.state_of(run) == "begun"
        if resume:
            grids.check_same(run, config)
            arguments = [str(run / CONFIG), "--resume"]
        else:
            grids.clear(run)
            path = self._folder / "configs" / f"{cell.name}.yaml"
            write_text(path, config.to_yaml())
            arguments = [str(path)]
        self._began[cell] = time.monotonic()
        _print(f"{cell.name}: {'resumes' if resume else 'starts'}")
        return start_run(arguments, self._log(cell))

    def _ended(self, cell: Cell, why: str) -> None:
        self._left -= 1
        text = ""
        if not why:
            try:
                text = self._result_text(cell)
            except ConfigError as error:
                why = str(error)
        elif cell in self._began:
            why = f"{why}: {last_words(self._log(cell))} (log: {self._log(cell)})"
        if why:
            self._failed[cell] = why
        _print(f"{cell.name}: {text or f'FAILED: {why}'}; {self._left} of {self._total} left")

    def _result_text(self, cell: Cell) -> str:
        """Raises ConfigError where the run left no whole folder."""
        lacking = grids.missing(self._folder / cell.name)
        if lacking:
            raise ConfigError(f"the run ended, but it is not complete: {lacking} (log: {self._log(cell)})")
        result = read_result(self._folder, cell)
        accuracy, tokens = (_written(result, name) for name in ("avg_at_k", "tokens_generated"))
        seconds = time.monotonic() - self._began[cell]
        warned = "".join(f"; WARNING: {endings.words(one)}" for one in result.unfair)
        return f"done, avg@{result.k or 'k'} {accuracy}, {tokens} tokens generated, {seconds:.0f} s{warned}"

    def _log(self, cell: Cell) -> Path:
        return self._folder / "logs" / f"{cell.name}.log"


def _written(result: CellResult, name: str) -> str:
    value = result.figures[name]
    return "–" if value is None else FIGURES[name].write(value)


def _check_can_be_matched(label: str, source: str, config: Config) -> None:
    """What would else show only after the run that it is made from. Raises ConfigError."""
    rule = config.termination
    if rule.policy != source or rule.apply != "stop" or rule.shadow or rule.control_fraction == 0:
        raise ConfigError(
            f"{label} cannot be made from row {source!r}: it needs policy {source}, apply stop, no shadow and a "
            f"control arm; found policy {rule.policy}, apply {rule.apply}, shadow {rule.shadow}, control_fraction "
            f"{rule.control_fraction:g}"
        )


def _print(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
