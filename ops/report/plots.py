"""The report's plots one by one: drawn once, written as PNG and as SVG that takes on the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ops.plots import THEMED, font_gaps_allowed
from ops.report import course, panels
from ops.report.run import ReportRun
from ops.report.traces import draw_bookings

NARROW, WIDE = 8.0, 13.0  # inches


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the report: what it shows in a sentence, its height, how it is drawn, and its width."""

    caption: str
    height_inches: float
    draw: Callable[[Figure, ReportRun], None]
    width_inches: float = NARROW


def _single(draw: Callable[[Any, ReportRun], None], right: float = 0.97) -> Callable[[Figure, ReportRun], None]:
    """A plot of one panel."""

    def draw_figure(figure: Figure, run: ReportRun) -> None:
        draw(figure.add_axes((0.11, 0.16, right - 0.11, 0.68)), run)

    return draw_figure


def _draw_fates(axes: Any, run: ReportRun) -> None:
    panels.draw_fates(axes, run.lines)


PLOTS = {
    "accuracy": Plot("Accuracy of the evaluated versions over tokens generated", 4.2, _single(panels.draw_accuracy)),
    "saving": Plot("Length saving so far, with its 95 % interval", 4.2, _single(course.draw_saving)),
    "length": Plot("Mean length of both arms over policy versions", 4.2, _single(panels.draw_mean_length)),
    "tokens": Plot("What became of each arm's tokens", 4.2, _single(_draw_fates)),
    "threshold": Plot("Threshold, and where the policy fired, over tokens generated", 5.6, course.draw_threshold),
    "reasons": Plot("Why rollouts ended, by arm, over tokens generated", 5.6, course.draw_reasons),
    "heatmap": Plot("Divergence over rollouts and positions, with cuts", 7.0, draw_bookings, WIDE),
    "latency": Plot("Stage latencies, and the learner's time", 5.6, course.draw_latency),
    "staleness": Plot("Staleness of the trajectories", 4.2, course.draw_staleness),
    "divergence": Plot("Divergence and entropy in training, by step", 4.2, _single(course.draw_loss)),
    "drift": Plot("Drift guards by step, and where the policy fired in both arms", 5.6, course.draw_drift),
}
"""Name of the file under figures/, and of the plot in the page → plot."""


def draw_all(run: ReportRun) -> dict[str, Figure]:
    """All plots by name."""
    figures = {}
    # Reasons in a run's files may hold anything, dollars as well.
    with font_gaps_allowed(), matplotlib.rc_context({"text.parse_math": False}):
        for name, plot in PLOTS.items():
            figures[name] = Figure(figsize=(plot.width_inches, plot.height_inches), facecolor="white")
            FigureCanvasAgg(figures[name])
            plot.draw(figures[name], run)
    return figures


# --- SVG -----------------------------------------------------------------------------------------------------------

_GROUP_ID = re.compile(r"(<g) id=\"[^\"]*\"")
_OUTSIDE = re.compile(r"<metadata>.*?</metadata>|<style .*?</style>| xmlns(?::xlink)?=\"[^\"]*\"", re.DOTALL)


def svg(figure: Figure, name: str) -> str:
    """A figure as an <svg> element for a page: text as text, no fixed size, ids that are this plot's own."""
    with font_gaps_allowed(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = _OUTSIDE.sub("", text[text.index("<svg") :])
    text = _GROUP_ID.sub(r"\1", text)
    for attribute in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    for colour, variable in THEMED.items():
        text = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", text, flags=re.IGNORECASE)
    return text
