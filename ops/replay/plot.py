"""The trade-off of a sweep as a picture: what a setting saves against the right answers that it cuts off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, plain, say_missing, say_title
from ops.replay.results import HitShare, Outcome

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, GREY)
_MARKERS = "os^Dv"
_MOST_NAMED = 24  # groups in the legend
_ASIDE = ((7, 5), (7, -12), (-7, 5), (-7, -12), (0, 10), (0, -16), (18, 0), (-18, 0))  # points


@dataclass(frozen=True, slots=True)
class SettingPoint:
    """A setting in the picture: its name beside the point, the group that it is drawn in, and what it came to."""

    name: str
    group: str
    outcome: Outcome


def draw(points: Sequence[SettingPoint], recorded: Sequence[SettingPoint], title: str, key: str) -> Figure:
    """`points` of one group are joined in their order if their names are numbers; `key`: what these are values of.

    `recorded`: the run's own settings, by the numbers on record and by computed ones, marked apart.
    """
    groups = {point.group for point in points}
    names = [*groups, *(point.name for point in recorded)]
    # The legend stands beside the axes where there are groups, and is as wide as its longest name.
    aside = 0.9 + 0.09 * max(len(name) for name in names) if len(groups) > 1 else 0.55  # inches
    # Titles are 17 points high, bold: 0.16 inches a letter.
    width = max(1.0 + 7.7 + aside, 1.2 + 0.16 * len(title), 11.0)
    figure = Figure(figsize=(width, 7.0), facecolor="white")
    FigureCanvasAgg(figure)
    # Names may hold anything, dollars as well.
    with matplotlib.rc_context({"text.parse_math": False}):
        _draw(figure, points, recorded, title, key)
    return figure


def _draw(
    figure: Figure, points: Sequence[SettingPoint], recorded: Sequence[SettingPoint], title: str, key: str
) -> None:
    groups = list(dict.fromkeys(point.group for point in points))
    named = len(groups) > 1
    width = figure.get_figwidth()
    axes = figure.add_axes((1.0 / width, 0.11, 7.7 / width, 0.76))
    drawn = [point for point in (*points, *recorded) if point.outcome.saving is not None and _risk(point) is not None]
    if not drawn:
        say_missing(axes, title, "no setting became active: lower min_calibration or warmup_steps")
        return
    for place, group in enumerate(groups):
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place // len(_COLOURS) % len(_MARKERS)]
        _draw_group(axes, [point for point in drawn if point.group == group and point in points], colour, marker)
    for point, (marker, size) in zip(recorded, (("*", 19), ("P", 12)), strict=False):
        if point in drawn:
            # Hollow: a swept point may lie beneath.
            look: dict[str, Any] = {
                "markerfacecolor": "none",
                "markeredgecolor": INK,
                "markersize": size,
                "linestyle": "none",
            }
            axes.plot(*_at(point), marker=marker, label=point.name, zorder=4, **look)
    _finish(axes, drawn, title, key)
    if axes.get_legend_handles_labels()[1]:
        # Beside the plot where there are groups: no place within it is sure to be free.
        where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if named else {"loc": "best"}
        axes.legend(frameon=False, fontsize=11, labelcolor=INK, handlelength=1.4, **where)
    _write_names(figure, axes, [point for point in drawn if point in points])


def _risk(point: SettingPoint) -> HitShare | None:
    """What is on the y-axis: false stops; where answers are not known, cuts."""
    share = point.outcome.early if point.outcome.early is not None else point.outcome.cut
    return share if share.count else None


def _at(point: SettingPoint) -> tuple[float, float]:
    share = _risk(point)
    assert share is not None and share.value is not None and point.outcome.saving is not None
    return 100 * point.outcome.saving, 100 * share.value


def _draw_group(axes: Any, points: Sequence[SettingPoint], colour: str, marker: str) -> None:
    if not points:
        return
    places = np.array([_at(point) for point in points])
    shown = points[0].group if len(axes.get_legend_handles_labels()[1]) < _MOST_NAMED else None
    line = "-" if all(_is_number(point.name) for point in points) else "none"
    look: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 7, "linewidth": 1.4}
    axes.plot(places[:, 0], places[:, 1], linestyle=line, label=shown, zorder=3, **look)
    for point, (x, y) in zip(points, places, strict=True):
        share, saving = _risk(point), point.outcome.saving_interval
        if share is not None and share.interval is not None:
            axes.plot([x, x], [100 * end for end in share.interval], color=colour, linewidth=1, alpha=0.35)
        if saving is not None:
            axes.plot([100 * end for end in saving], [y, y], color=colour, linewidth=1, alpha=0.35)


def _is_number(name: str) -> bool:
    """A line says that there are values between two points: there are none between two policies."""
    try:
        float(name)
    except ValueError:
        return False
    return True


def _finish(axes: Any, drawn: Sequence[SettingPoint], title: str, key: str) -> None:
    known = any(point.outcome.early is not None for point in drawn)
    say_title(axes, title, pad=26)
    axes.text(
        0,
        1.02,
        f"beside the points: {key}; bars: 95 % intervals; down and to the right is better",
        transform=axes.transAxes,
        fontsize=12,
        color=GREY,
        va="bottom",
    )
    axes.set_xlabel("tokens saved up to the trigger, % of those written without cutting")
    axes.set_ylabel("false stops: right rollouts whose kept text is not right, %" if known else "rollouts cut, %")
    plain(axes)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.margins(x=0.06)


def _write_names(figure: Figure, axes: Any, points: Sequence[SettingPoint]) -> None:
    """Each name at a place where it covers no other and no point; names without such a place are left out."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    dots = axes.transData.transform([_at(point) for point in points])
    taken: list[Any] = []
    for point in points:
        for dx, dy in _ASIDE:
            label = axes.annotate(
                point.name,
                _at(point),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                fontsize=11,
                color=INK,
                path_effects=[withStroke(linewidth=3, foreground="white")],
                zorder=5,
            )
            box = label.get_window_extent(renderer).padded(1)
            inside = axes.bbox.padded(30).containsx(box.x0) and axes.bbox.padded(30).containsx(box.x1)
            if (
                inside
                and not any(box.overlaps(other) for other in taken)
                and not any(box.contains(*dot) for dot in dots)
            ):
                taken.append(box)
                break
            label.remove()
