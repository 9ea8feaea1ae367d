"""The picture of a comparison: final accuracy by row with every seed, and accuracy over tokens generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from common.runfiles.lines import Object
from ops.compare.data import Comparison
from ops.compare.drift import GuardPoint, course, cut_something
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, plain, say_missing, say_title
from ops.report.data import Accuracy
from ops.stats.seeds import mean_interval

_COLOURS = (
    GREY,
    BLUE,
    ORANGE,
    GREEN,
    VERMILLION,
    PURPLE,
    SKY,
    INK,
)
_MARKERS = "osD^vP"  # go with the lines' styles: from the ninth row on colours come again
_STYLES = ("-", "--", ":")


def draw(comparison: Comparison) -> Figure:
    """Two panels side by side, as high as the rows need, and as wide as their labels; two more where a policy cut."""
    shown = [label for label in comparison.labels if comparison.of(label)]
    upper = max(5.0, 1.9 + 0.5 * len(shown))
    courses = {label: [result.steps for result in comparison.of(label)] for label in shown}
    courses = {label: cells for label, cells in courses.items() if cut_something(cells)}
    lower = 4.0 if courses else 0.0
    height = upper + lower
    side = max(2.0, 0.5 + 0.1 * max((len(label) for label in shown), default=0))  # inches, on both sides
    width = 2 * side + 11.0
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        bottom, top = (0.75 + lower) / height, 1 - 0.7 / height
        left, right, wide = side / width, (side + 6.0) / width, 4.6 / width
        tried = {result.k for result in comparison.results.values()} - {None}
        name = f"avg@{tried.pop()}" if len(tried) == 1 else "avg@k"
        _draw_final(figure.add_axes((left, bottom, 4.9 / width, top - bottom)), comparison, shown, name)
        _draw_curves(figure.add_axes((right, bottom, wide, top - bottom)), comparison, shown, name)
        if lower:
            below, high = 0.75 / height, (lower - 1.35) / height
            _draw_cut_rates(figure.add_axes((left, below, 4.9 / width, high)), courses, shown)
            _draw_thresholds(figure.add_axes((right, below, wide, high)), courses, shown)
    return figure


def style_of(place: int) -> tuple[str, str, str]:
    """Colour, marker and line style of the row at a place."""
    again = place // len(_COLOURS)
    return _COLOURS[place % len(_COLOURS)], _MARKERS[again % len(_MARKERS)], _STYLES[again % len(_STYLES)]


def _draw_final(axes: Any, comparison: Comparison, shown: Sequence[str], name: str) -> None:
    title = f"Final {name}: seeds, mean, 95 % t interval"
    values = {label: list(comparison.values(label, "avg_at_k").values()) for label in shown}
    if not any(values.values()):
        say_missing(axes, title, "no evaluation on record")
        return
    say_title(axes, title)
    for place, label in enumerate(shown):
        colour, marker, _ = style_of(place)
        interval = mean_interval(values[label])
        axes.plot(values[label], [place + 0.16] * len(values[label]), marker, color=colour, markersize=6, alpha=0.55)
        if interval is None:
            continue
        if interval.low is not None and interval.high is not None:
            axes.plot([interval.low, interval.high], [place - 0.12] * 2, color=colour, linewidth=2.6)
        axes.plot(interval.mean, place - 0.12, "|", color=colour, markersize=15, markeredgewidth=3)
    axes.set_yticks(range(len(shown)), labels=shown)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(f"{name}, share right")
    plain(axes, grid=False)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_curves(axes: Any, comparison: Comparison, shown: Sequence[str], name: str) -> None:
    title = f"{name} over tokens generated"
    curves = {label: [result.curve for result in comparison.of(label) if result.curve] for label in shown}
    if not any(curves.values()):
        say_missing(axes, title, "no evaluation on record")
        return
    say_title(axes, title)
    for place, label in enumerate(shown):
        colour, marker, style = style_of(place)
        for curve in curves[label]:
            _line(axes, curve, color=colour, linewidth=0.9, linestyle=style, alpha=0.35)
        if curves[label]:
            mean = mean_curve(curves[label])
            _line(axes, mean, color=colour, linewidth=2.4, linestyle=style, marker=marker, markersize=5, label=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens generated so far")
    axes.set_ylabel(f"{name}, share right")
    axes.legend(
        frameon=False,
        fontsize=12,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        borderaxespad=0,
        labelcolor=INK,
    )
    plain(axes)


_Courses = Mapping[str, Sequence[Sequence[Object]]]


def _draw_cut_rates(axes: Any, courses: _Courses, shown: Sequence[str]) -> None:
    say_title(axes, "Cut rate by step: treated (line), control (dots)")
    for label, cells in courses.items():
        colour, _, style = style_of(shown.index(label))
        treated, control = course(cells, "cut_rate_treated"), course(cells, "cut_rate_control")
        _points(axes, treated, color=colour, linewidth=2.0, linestyle=style)
        _points(axes, control, color=colour, marker=".", linestyle="", markersize=7)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("learner step")
    plain(axes)


def _draw_thresholds(axes: Any, courses: _Courses, shown: Sequence[str]) -> None:
    """Against the first one: they differ by orders of magnitude, and in their units."""
    title = "Threshold by step, first = 1"
    found = {label: course(cells, "threshold") for label, cells in courses.items()}
    found = {label: points for label, points in found.items() if points and points[0].value}
    if not found:
        say_missing(axes, title, "no policy with a threshold")
        return
    say_title(axes, title)
    for label, points in found.items():
        colour, _, style = style_of(shown.index(label))
        relative = [GuardPoint(point.step, point.value / points[0].value) for point in points]
        _points(axes, relative, color=colour, linewidth=2.0, linestyle=style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("learner step")
    plain(axes)


def _points(axes: Any, points: Sequence[GuardPoint], **look: Any) -> None:
    axes.plot([point.step for point in points], [point.value for point in points], **look)


def _line(axes: Any, curve: Sequence[Accuracy], **look: Any) -> None:
    axes.plot([point.tokens for point in curve], [point.avg_at_k for point in curve], **look)


def mean_curve(curves: Sequence[Sequence[Accuracy]]) -> list[Accuracy]:
    """Mean tokens and mean accuracy over seeds, at every step that all seeds evaluated; and of the last evaluations,
    whose steps differ where runs end by tokens."""
    common = set.intersection(*({point.step for point in curve[:-1]} for curve in curves))
    groups = [[point for curve in curves for point in curve[:-1] if point.step == step] for step in sorted(common)]
    return [_mean_point(points) for points in [*groups, [curve[-1] for curve in curves]]]


def _mean_point(points: Sequence[Accuracy]) -> Accuracy:
    count = len(points)
    return Accuracy(
        max(point.step for point in points),
        round(sum(point.tokens for point in points) / count),
        sum(point.avg_at_k for point in points) / count,
        sum(point.pass_at_k for point in points) / count,
    )
