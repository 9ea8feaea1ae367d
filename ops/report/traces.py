"""Panels of the report on the divergence along rollouts: heat maps of many, curves of single ones, with cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.config import Termination
from common.policies import unit_of
from common.runfiles.records import Trace
from ops.plots import BLUE, GREY, INK, SKY, VERMILLION, plain, say_missing, say_title
from ops.report import data
from ops.report.run import ReportRun
from ops.stats.saving import ARMS
from ops.words import fired_word

ROWS = {"treated": 36, "control": 12}  # of the picture's heat map
_BOOKED_ROWS = 150  # of the page's
_TEXT_CHARACTERS = 60
_CUT = "#FF1F3D"  # visible against the map's blues and yellows, in a light and a dark page


def draw_traces(figure: Figure, run: ReportRun, decode: Callable[[list[int]], str] | None) -> None:
    """Heat map of rollouts, and below it one of each arm as a curve, over the same token positions."""
    grid = figure.add_gridspec(
        3, 1, left=0.505, right=0.925, top=0.858, bottom=0.275, hspace=0.4, height_ratios=(2.7, 1, 1)
    )
    groups = [data.heat_rows(run.traces[arm].traces, ROWS[arm]) for arm in ARMS]
    cut = any(groups)
    heat = figure.add_subplot(grid[0] if cut else grid[:])
    if not cut:
        groups = [data.heat_rows(run.traces["uncut"].traces, sum(ROWS.values())), []]
    rows = groups[0] + groups[1]
    if not rows:
        say_missing(heat, "Divergence along rollouts", _why_no_traces(run))
        return
    width = data.shown_width(rows)
    _draw_heat(figure, heat, groups, width)
    heat.set_autoscalex_on(False)  # the panels below share its x axis
    say_title(heat, _heat_title(run), pad=34 if cut else 10)
    if not cut:
        heat.set_xlabel("token position", fontsize=13, color=INK)
        return
    _draw_sides(heat, run)
    above = figure.add_subplot(grid[1], sharex=heat)
    examples = [above, figure.add_subplot(grid[2], sharex=heat, sharey=above)]
    for axes, arm in zip(examples, ARMS, strict=True):
        _draw_example(axes, data.typical(run.traces[arm].traces), arm, run.config.termination, decode)
    above.tick_params(labelbottom=False)
    examples[1].set_xlabel("token position")
    _legend_of_examples(figure, "$H_t$" if run.config.termination.policy == "entropy" else "$d_t$")


def _heat_title(run: ReportRun) -> str:
    if not run.traces["treated"].found:
        return "The policy never fired: divergence along some rollouts"
    fired, judged = data.fired_share(run.lines)
    word = fired_word(run.config)
    where = f"{word} where the teacher agrees" if run.config.termination.policy == "kat" else word
    return f"{where}: " + (
        f"{fired:,} of {judged:,} rollouts" if judged else f"{run.traces['treated'].found:,} rollouts"
    )


def _draw_sides(axes: Any, run: ReportRun) -> None:
    """Mean divergence before and at the cut, and in control rollouts after the trigger: is the signal really dead?"""
    before, detection, _ = data.mean_divergences(run.traces["treated"].traces)
    _, _, after = data.mean_divergences(run.traces["control"].traces)
    known = {"kept": before, "cut to trigger": detection, "control after trigger": after}
    text = " · ".join(f"{name} {value:.2g}" for name, value in known.items() if value is not None)
    axes.text(0, 1.045, f"mean nats per token:  {text}", transform=axes.transAxes, fontsize=12.5, color=GREY)


def _draw_heat(figure: Figure, axes: Any, groups: Sequence[Sequence[Trace]], width: int) -> None:
    gap = 2 if all(groups) else 0
    image = np.concatenate(
        [data.heat_map(groups[0], width), np.full((gap, width), np.nan), data.heat_map(groups[1], width)]
    )
    low, high = np.nanquantile(image, [0.02, 0.98])
    shown = _show_image(axes, image, low, high)
    places = [*range(len(groups[0])), *range(len(groups[0]) + gap, len(image))]
    for row, trace in zip(places, [*groups[0], *groups[1]], strict=True):
        if trace.fired:
            axes.plot(
                [trace.keep] * 2, [row, row + 1], color=VERMILLION, linewidth=3.2, solid_capstyle="butt", clip_on=False
            )
            axes.plot(
                trace.trigger,
                row + 0.5,
                marker="<",
                color="white",
                markeredgecolor=INK,
                markeredgewidth=0.6,
                markersize=5,
            )
    _label_groups(axes, groups, gap)
    _draw_colour_bar(figure, [axes], shown, low, high)


def _show_image(axes: Any, image: data.Floats, low: float, high: float) -> Any:
    """Draw log10 of nats as colours, from `low` to `high`."""
    return axes.imshow(
        image,
        aspect="auto",
        cmap="cividis",
        vmin=low,
        vmax=high,
        interpolation="nearest",
        extent=(0, image.shape[1], len(image), 0),
    )


def _draw_colour_bar(figure: Figure, panels: Sequence[Any], shown: Any, low: float, high: float) -> None:
    """Draw the colour bar to the right of stacked panels."""
    box, lowest = panels[0].get_position(), panels[-1].get_position().y0
    bar = figure.colorbar(shown, cax=figure.add_axes((box.x1 + 0.012, lowest, 0.01, box.y1 - lowest)))
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # else 256 shapes in the SVG
    exponents = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    bar.set_ticks(list(exponents), labels=[f"{10.0**exponent:g}" for exponent in exponents])
    bar.ax.tick_params(labelsize=12, colors=INK)
    bar.set_label("divergence, nats", fontsize=12.5, color=INK)
    bar.outline.set_visible(False)


def draw_bookings(figure: Figure, run: ReportRun) -> None:
    """Heat maps of the rollouts of both arms in the order of booking, with cuts."""
    sample = run.traces["booked"]
    rows = data.spread(sample.traces, _BOOKED_ROWS)
    if not rows:
        say_missing(figure.add_axes((0.09, 0.12, 0.85, 0.76)), "Divergence along rollouts", _why_no_traces(run))
        return
    width = data.shown_width(rows)
    low, high = np.nanquantile(data.heat_map(rows, width), [0.02, 0.98])
    groups = {arm: [trace for trace in rows if trace.arm == arm] for arm in ARMS}
    panels = _stacked(figure, {arm: traces for arm, traces in groups.items() if traces}, len(rows) / 5)
    for arm, axes in panels.items():
        shown = _show_image(axes, data.heat_map(groups[arm], width), low, high)
        _mark_cuts(axes, groups[arm])
        axes.set_ylabel(f"{len(groups[arm])} {arm}", fontsize=13, color=INK)
    first, *_, last = list(panels.values()) * 2
    last.tick_params(labelbottom=True)
    last.set_xlabel("token position", fontsize=13, color=INK)
    say_title(first, _heat_title(run), pad=26)
    text = f"{len(rows):,} of {sample.found:,} rollouts, first booked on top; red: cut, white: trigger"
    first.text(0, 1.0, text, transform=first.transAxes, fontsize=11.5, color=GREY, va="bottom")
    _draw_colour_bar(figure, list(panels.values()), shown, low, high)


def _stacked(figure: Figure, groups: Mapping[str, Sequence[Trace]], fewest: float) -> dict[str, Any]:
    """Stacked panels with heights by their number of rows, at least `fewest`."""
    heights = [max(len(traces), fewest) for traces in groups.values()]
    grid = figure.add_gridspec(
        len(groups), 1, left=0.05, right=0.91, top=0.88, bottom=0.09, hspace=0.05, height_ratios=heights
    )
    panels = {arm: figure.add_subplot(grid[place]) for place, arm in enumerate(groups)}
    for axes in panels.values():
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=12.5, colors=INK, labelbottom=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return panels


def _why_no_traces(run: ReportRun) -> str:
    return "no traces.jsonl yet" if run.config.feeder.record_traces else "not recorded (feeder.record_traces is off)"


def _mark_cuts(axes: Any, traces: Sequence[Trace]) -> None:
    """Mark the cut of each row, or the would-be cut in the control arm, and the trigger."""
    cut = [(row, trace) for row, trace in enumerate(traces) if trace.fired]
    for name, colour in (("trigger", "white"), ("keep", _CUT)):
        marks = [[(getattr(trace, name), row), (getattr(trace, name), row + 1)] for row, trace in cut]
        axes.add_collection(LineCollection(marks, colors=colour, linewidths=4, capstyle="butt"), autolim=False)


def _label_groups(axes: Any, groups: Sequence[Sequence[Trace]], gap: int) -> None:
    first, second = (len(group) for group in groups)
    places = {f"{first} treated": first / 2, f"{second} control": first + gap + second / 2}
    named = [(place, name) for name, place in places.items() if not name.startswith("0 ")]
    axes.set_yticks(
        [place for place, _ in named], labels=[name for _, name in named], rotation=90, va="center", fontsize=12.5
    )
    axes.tick_params(length=0, labelsize=12.5, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_example(
    axes: Any, trace: Trace | None, arm: str, rule: Termination, decode: Callable[[list[int]], str] | None
) -> None:
    """One rollout: divergence (`entropy`: the student's entropy), window mean, threshold, keep, trigger, and its text
    around the cut."""
    if trace is None:
        axes.text(
            0.5,
            0.5,
            f"no {arm} rollout in which the policy fired",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=GREY,
            fontsize=13,
        )
        axes.set_yticks([])
        plain(axes)
        return
    of_entropy = rule.policy == "entropy" and trace.view is not None
    values = trace.view[0] if of_entropy and trace.view is not None else trace.divergence
    places = np.arange(1, len(values) + 1)
    axes.plot(places, np.maximum(values, data.FLOOR_NATS), color=SKY, linewidth=0.9)
    means = np.maximum(data.window_means(values, rule.window), data.FLOOR_NATS)
    axes.plot(places, means, color=BLUE, linewidth=2)
    if trace.threshold is not None and unit_of(rule.policy) == "nats":
        past = means > trace.threshold if rule.policy == "kat_inverse" else means < trace.threshold
        axes.axhline(trace.threshold, color=INK, linewidth=1.1, linestyle="--")
        axes.fill_between(places, means, trace.threshold, where=past, color=VERMILLION, alpha=0.35, linewidth=0)
    axes.axvline(trace.keep, color=VERMILLION, linewidth=2.4)
    axes.axvline(trace.trigger, color=INK, linewidth=1.4, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("entropy, nats" if of_entropy else "nats")
    label = f"{arm}, {'stopped' if trace.stopped else 'not stopped'}: "
    parts = cut_parts(trace, decode)
    _write_parts(axes, [(label, INK, "DejaVu Sans"), *parts])
    plain(axes)


def cut_parts(trace: Trace, decode: Callable[[list[int]], str] | None) -> list[tuple[str, str, str]]:
    """The text around the cut as (text, colour, font family); the rollout's id if it cannot be decoded."""
    if decode is None:
        return [(f"{trace.rid}, {trace.keep} tokens kept", GREY, "DejaVu Sans")]
    texts = data.cut_text(trace, decode, _TEXT_CHARACTERS)
    colours = (INK, VERMILLION, GREY)
    parts = [(text, colour, "DejaVu Sans Mono") for text, colour in zip(texts, colours, strict=True)]
    return [*parts[:1], ("✂", VERMILLION, "DejaVu Sans"), *parts[1:]]


def _write_parts(axes: Any, parts: Iterable[tuple[str, str, str]]) -> None:
    """Write pieces of text in different colours on one line above the axes."""
    renderer, inverse = axes.figure.canvas.get_renderer(), axes.transAxes.inverted()
    start = 0.0
    for text, colour, family in parts:
        if text:
            piece = axes.text(
                start,
                1.06,
                text,
                transform=axes.transAxes,
                color=colour,
                family=family,
                fontsize=12.5,
                parse_math=False,
            )
            start = inverse.transform(piece.get_window_extent(renderer).corners()[-1])[0]


def _legend_of_examples(figure: Figure, signal: str) -> None:
    handles = [
        Line2D([], [], color=SKY, linewidth=1.2, label=signal),
        Line2D([], [], color=BLUE, linewidth=2, label="window mean $z_t$"),
        Line2D([], [], color=INK, linewidth=1.1, linestyle="--", label="threshold"),
        Line2D([], [], color=VERMILLION, linewidth=2.6, label="cut (keep)"),
        Line2D([], [], color=INK, linewidth=1.4, linestyle=":", marker="<", markerfacecolor="white", label="trigger"),
    ]
    figure.legend(
        handles=handles,
        ncol=5,
        frameon=False,
        fontsize=12,
        loc="lower center",
        bbox_to_anchor=(0.715, 0.183),
        columnspacing=1.3,
        handlelength=1.5,
    )
