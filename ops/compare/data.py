"""Results of a comparison's cells, from their folders alone; and the same as CSV, one row per cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError
from common.runfiles.records import BookLine, Ended, Scores, Step, Summary
from common.runfiles.run import RunFolder
from ops.compare import drift
from ops.compare import match as matching
from ops.compare.grid import Cell, Grid, State, check_one_experiment, read_grid, source_of, state_of
from ops.report import data
from ops.stats import endings
from ops.stats.saving import ARMS


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a cell: its name in the CSV, its head in a table, how it is written (× `scale`), and its unit."""

    name: str
    head: str
    form: str
    unit: str = ""
    scale: float = 1.0

    def write(self, value: float, sign: str = "") -> str:
        """The number without its unit; `sign` "+" shows one."""
        return format(self.scale * value, sign + self.form)


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("avg_at_k", "avg@k", ".3f"),
        Figure("pass_at_k", "pass@k", ".3f"),
        Figure("tokens_generated", "generated", ",.0f"),
        Figure("tokens_trained", "trained", ",.0f"),
        Figure("tokens_detection", "detection", ",.0f"),
        Figure("tokens_overshoot", "overshoot", ",.0f"),
        Figure("steps", "steps", ",.1f"),
        Figure("wall_s", "wall, s", ",.0f"),
        Figure("length", "length", ",.1f"),
        Figure("length_treated", "treated", ",.1f"),
        Figure("length_control", "control", ",.1f"),
        Figure("kept_treated", "kept", ",.1f"),
        Figure("length_saving", "saving", ".1f", " %", 100.0),
        *(Figure(f"{fate}_share", fate.replace("_", " "), ".2f", " %", 100.0) for fate in endings.MEANINGS),
        Figure("trainable_trained", "mean trained", ",.1f"),
        Figure("trainable_stale", "mean stale", ",.1f"),
        Figure("written_trained", "written: trained", ",.1f"),
        Figure("written_stale", "written: stale", ",.1f"),
        *(
            Figure(f"{guard}_{when}", guard, ".3g" if guard == "threshold" else ".3f")
            for guard in drift.GUARDS
            for when in ("early", "late")
        ),
    )
}


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell. `figures` by name, None where the run has none; `curve`: its evaluations over tokens; `steps`:
    those in which its policy could have cut; `left_out`: what it did not train on."""

    cell: Cell
    config: Config
    figures: dict[str, float | None]
    curve: list[data.Accuracy]
    steps: list[Step]
    k: int | None
    problems: int | None
    evaluated_step: int | None
    left_out: list[endings.UntrainedEnding]

    @property
    def unfair(self) -> list[endings.UntrainedEnding]:
        """What was left out of its training and makes its sample another than the one that it wrote."""
        return [one for one in self.left_out if one.warns]

    @property
    def policy(self) -> str:
        return self.config.termination.policy


@dataclass(frozen=True, slots=True)
class Comparison:
    """A grid with the results of the cells that are done, the states of all, and how well matches were met."""

    name: str
    grid: Grid
    states: dict[Cell, State]
    results: dict[Cell, CellResult]
    matches: list[tuple[Cell, str, bool | None]] = field(default_factory=list)
    """The cell that was matched, realised means of its source and of it in words, whether they agree within 2 %
    (None: no means)."""

    @property
    def matched(self) -> list[str]:
        """The labels of the rows that are made from others."""
        return [label for label in self.labels if source_of(label) is not None]

    @property
    def labels(self) -> list[str]:
        return [row.label for row in self.grid.rows]

    @property
    def undone(self) -> list[Cell]:
        return [cell for cell, state in self.states.items() if state != "done"]

    def of(self, label: str) -> list[CellResult]:
        """Results of a row, by seed."""
        return [self.results[cell] for cell in sorted(self.results) if cell.label == label]

    def values(self, label: str, figure: str) -> dict[int, float]:
        """Seed → figure, of the cells of a row that have it."""
        found = {result.cell.seed: result.figures[figure] for result in self.of(label)}
        return {seed: value for seed, value in found.items() if value is not None}


def read_comparison(folder: Path) -> Comparison:
    """Everything that is reported. Raises ConfigError: no comparison's folder, a file in it is damaged, or its cells
    are not of one experiment."""
    grid = read_grid(folder)
    order = [Cell(row.label, seed) for row in grid.rows for seed in grid.seeds]
    states = {cell: state_of(folder / cell.name) for cell in order}
    results = {cell: read_result(folder, cell) for cell in order if states[cell] == "done"}
    check_one_experiment(grid, {cell: result.config for cell, result in results.items()})
    matches = []
    for made in results:
        source = made.needs
        if source is not None and source in results:
            matches.append((made, *_realised(folder / source.name, folder / made.name)))
    return Comparison(folder.resolve().name, grid, states, results, matches)


def _realised(source: Path, made: Path) -> tuple[str, bool | None]:
    try:
        return matching.compare(source, made)
    except ConfigError as error:
        return str(error), None


def read_result(folder: Path, cell: Cell) -> CellResult:
    """A done cell of a comparison's folder. Raises ConfigError for a damaged one."""
    run = RunFolder(folder / cell.name)
    config, summary = run.config, run.summary
    if summary is None:
        raise ConfigError(f"{run.path}: no summary.json; expected the folder of a finished run")
    lines = list(run.rollouts())
    evaluations = sorted(run.evaluations(), key=lambda one: one.step)
    last = evaluations[-1] if evaluations else None
    scores = last.scores if last else None
    ended = endings.by_ending(lines)
    steps = drift.judged(list(run.steps()), config.termination.policy)
    return CellResult(
        cell,
        config,
        _figures(summary, scores, lines) | _left_out_figures(ended) | drift.early_and_late(steps),
        data.accuracy_curve(evaluations, data.generated_at_steps(lines, config.learner.batch_size)),
        steps,
        scores.k if scores else None,
        scores.n if scores else None,
        last.step if last else None,
        endings.left_out(ended),
    )


def _figures(summary: Summary, last: Scores | None, lines: list[BookLine]) -> dict[str, float | None]:
    names = ("tokens_generated", "tokens_trained", "tokens_detection", "tokens_overshoot")
    by_arm = {arm: [line for line in lines if line.compared and line.arm == arm] for arm in ARMS}
    return {
        "avg_at_k": last.avg_at_k if last else None,
        "pass_at_k": last.pass_at_k if last else None,
        **{name: sum(getattr(arm, name) for arm in summary.arms.values()) for name in names},
        "steps": summary.steps,
        "wall_s": summary.wall_s,
        "length": _mean(data.finished(lines), "tokens_generated"),
        **{f"length_{arm}": _mean(of_arm, "tokens_generated") for arm, of_arm in by_arm.items()},
        "kept_treated": _mean(by_arm["treated"], "tokens_kept"),
        "length_saving": summary.length_saving.ratio,
    }


def _left_out_figures(ended: dict[str, Ended]) -> dict[str, float | None]:
    """Shares, 0 of what did not happen, and mean lengths of what was trained on and what was stale."""
    figures: dict[str, float | None] = {
        f"{fate}_share": ended[fate].share if fate in ended else 0.0 for fate in endings.MEANINGS
    }
    for fate in ("trained", "stale"):
        one = ended.get(fate)
        figures[f"trainable_{fate}"] = one.trainable.mean if one is not None and one.trainable is not None else None
        figures[f"written_{fate}"] = one.generated.mean if one is not None and one.generated is not None else None
    return figures


def _mean(lines: Iterable[BookLine], name: str) -> float | None:
    return drift.mean_known(getattr(line, name) for line in lines)


def to_csv(comparison: Comparison) -> str:
    """One row per cell, done or not, with all digits; empty if there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "seed", "state", "policy", "k", "problems", "evaluated_step", *FIGURES])
    for cell, state in comparison.states.items():
        result = comparison.results.get(cell)
        rest: list[Any] = [] if result is None else [result.policy, result.k, result.problems, result.evaluated_step]
        figures = [] if result is None else [result.figures[name] for name in FIGURES]
        row = [cell.label, cell.seed, state, *rest, *figures]
        writer.writerow([*row, *[None] * (7 + len(FIGURES) - len(row))])
    return out.getvalue()
