"""The report of a run in any state, from its folder alone: report.png, report.html, figures/.

report.png is an overview. Left: the results (accuracy, length); right: the reason (where the teacher's signal goes
dead); below: what became of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.runfiles.names import REPORT_PICTURE, REPORT_PLOTS
from ops.plots import GREY, INK, named, save_png
from ops.report import data, plots
from ops.report.page import write_page
from ops.report.panels import draw_accuracy, draw_fates, draw_length, headline
from ops.report.run import ReportRun, find_decoder, read_run
from ops.report.traces import draw_traces
from ops.words import policy_text, teachers_text

SIZE_INCHES, DOTS_PER_INCH = (16.0, 10.0), 100


def write_report(folder: Path) -> Path:
    """Write `report.png`, `report.html` and `figures/*.png` into a run's folder; returns the path of `report.png`.

    Raises:
        ConfigError: not a run's folder (no config.yaml), a file in it is damaged, or one cannot be written.
    """
    run = read_run(folder)
    target = folder / REPORT_PICTURE
    save_png(draw(run, find_decoder(run)), target, DOTS_PER_INCH)
    figures = plots.draw_all(run)
    plots_folder = folder / REPORT_PLOTS
    with named(plots_folder):
        plots_folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure, plots_folder / f"{name}.png", DOTS_PER_INCH)
    write_page(run, figures)
    return target


def draw(run: ReportRun, decode: Callable[[list[int]], str] | None) -> Figure:
    """The whole picture, 1600 x 1000 pixels."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 0.965, headline(run), fontsize=19, fontweight="bold", color=INK, va="center", parse_math=False)
    left = figure.add_gridspec(2, 1, left=0.055, right=0.425, top=0.895, bottom=0.285, hspace=0.6)
    draw_accuracy(figure.add_subplot(left[0]), run)
    draw_length(figure.add_subplot(left[1]), run)
    draw_traces(figure, run, decode)
    draw_fates(figure.add_axes((0.055, 0.064, 0.37, 0.095)), run.lines)
    draw_caption(figure, run)
    return figure


def draw_caption(figure: Figure, run: ReportRun) -> None:
    """The facts of the run, in small print."""
    config = run.config
    entries = [
        (
            "run",
            f"{config.name}: {run.steps_done} of {config.learner.max_steps} steps of {config.learner.batch_size}, task "
            f"{config.data.task}, at most {config.rollout.max_completion_length} tokens",
        ),
        ("models", f"{Path(config.student.model).name} learns from {teachers_text(config, short_names=True)}"),
        ("policy", policy_text(config, (line.threshold for line in run.lines))),
        ("finished", data.reasons_text(run.lines)),
        ("ledger", data.ledger_text(run.folder)),
    ]
    height = 0.152
    for name, text in entries:
        figure.text(0.465, height, name, fontsize=12.5, color=GREY)
        for line in wrap(text, 80):
            figure.text(0.522, height, line, fontsize=12.5, color=INK, parse_math=False)
            height -= 0.024
