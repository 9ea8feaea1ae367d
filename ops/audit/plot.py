"""audit.png: P(correct) by class of cut and by source, with 95 % intervals."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ops.audit.table import AuditResult
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILLION, plain, say_title

SIZE_INCHES, DOTS_PER_INCH = (12.0, 7.0), 100
# Colour, marker and name. A cut and the uncut rollouts that it is compared with share a marker.
_LOOKS = {
    "keep": (BLUE, "o", "student, from the kept prefix"),
    "uncut_keep": (GREY, "o", "the same, uncut rollouts"),
    "trigger": (VERMILLION, "s", "student, from the trigger"),
    "uncut_trigger": (GREY, "s", "the same, uncut rollouts"),
    "keep_teacher": (GREEN, "D", "teacher, from the kept prefix"),
    "whole": (ORANGE, "^", "what was written in fact"),
}
_STEP = 0.12  # of a class's width, between two sources


def draw(audit: AuditResult) -> Figure:
    """The figure, 1200 x 700 pixels."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"text.parse_math": False}):
        axes = figure.add_axes((0.075, 0.26, 0.9, 0.65))
        for place, source in enumerate(_LOOKS):
            _draw_source(axes, audit, source, (place - (len(_LOOKS) - 1) / 2) * _STEP)
        axes.set_xticks(range(len(audit.rows)), labels=[f"{row.kind}\n{row.cuts} cuts" for row in audit.rows])
        axes.set_xlim(-0.5, len(audit.rows) - 0.5)
        axes.set_ylim(-0.02, 1.02)
        for edge in range(len(audit.rows) - 1):
            axes.axvline(edge + 0.5, color=SKY, linewidth=0.8, linestyle=":")
        axes.set_ylabel("P(correct), mean over cuts")
        say_title(axes, f"{audit.run}: are the cuts of {audit.label} recoverable?")
        plain(axes)
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.01, -0.14), ncol=3, frameon=False, fontsize=12.5, labelcolor=INK
        )
        note = f"mean and 95 % interval, by prompt; {audit.samples} continuations of each prefix"
        figure.text(0.975, 0.02, note, fontsize=11.5, color=GREY, ha="right")
    return figure


def _draw_source(axes: Any, audit: AuditResult, source: str, offset: float) -> None:
    colour, marker, name = _LOOKS[source]
    found = [(place + offset, row.chances[source]) for place, row in enumerate(audit.rows)]
    points = [(place, one) for place, one in found if one is not None]
    below = [max(0.0, one.mean - one.low) for _, one in points]  # a rounding may put the mean outside
    above = [max(0.0, one.high - one.mean) for _, one in points]
    axes.errorbar(
        [place for place, _ in points],
        [one.mean for _, one in points],
        yerr=[below, above],
        fmt=marker,
        color=colour,
        markersize=7,
        linewidth=2,
        capsize=3,
        label=name,
    )
