"""The report of a run, from its folder alone and in whatever state the run is: report.png, report.html, figures/.

report.png is the run at a glance. Left: what it is for (accuracy, length); right: why (where the teacher's signal
goes dead); below: the bill.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import wrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ops.plots import GREY, INK, named, save_png
from ops.report import data, plots
from ops.report.page import write_page
from ops.report.panels import draw_accuracy, draw_fates, draw_length, headline
from ops.report.run import ReportRun, find_decoder, read_run
from ops.report.traces import draw_traces
from ops.words import policy_text

SIZE_INCHES, DOTS_PER_INCH = (16.0, 10.0), 100


def write_report(folder: Path) -> Path:
    """Write `report.png`, `report.html` and `figures/*.png` into a run's folder; returns the path of `report.png`.

    Raises:
        ConfigError: the folder is no run's (it has no config.yaml), a file in it is damaged, or one cannot be written.
    """
    run = read_run(folder)
    target = folder / "report.png"
    save_png(draw(run, find_decoder(run)), target, DOTS_PER_INCH)
    figures = plots.draw_all(run)
    with named(folder / "figures"):
        (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure, folder / "figures" / f"{name}.png", DOTS_PER_INCH)
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
    """What was run, in small print."""
    config = run.config
    done = run.steps[-1]["step"] if run.steps else 0
    entries = [
        (
            "run",
            f"{config.name}: {done} of {config.learner.max_steps} steps of {config.learner.batch_size}, task "
            f"{config.data.task}, at most {config.rollout.max_completion_length} tokens",
        ),
        ("models", f"{Path(config.student.model).name} learns from {Path(config.teacher.model).name}"),
        ("policy", policy_text(config, (line.threshold for line in run.lines))),
        ("finished", data.reasons_text(run.lines)),
        ("ledger", data.ledger_text(run.folder / "ledger.json")),
    ]
    height = 0.152
    for name, text in entries:
        figure.text(0.465, height, name, fontsize=12.5, color=GREY)
        for line in wrap(text, 80):
            figure.text(0.522, height, line, fontsize=12.5, color=INK, parse_math=False)
            height -= 0.024
