"""The tables and the picture of how cost grows, from the JSON that growth.py writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison import in_words, markdown
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ops.bench.speed import spread
from ops.plots import BLUE, GREY, INK, ORANGE, plain, save_png, say_title

TITLES = {
    "slots": ("The slot engine", "slots, all at work"),
    "in-flight": ("The teacher's engine", "rollouts in flight"),
    "workers": ("Whole runs", "rollout workers + teachers"),
    "shards": ("Chunks through the roles", "redis.shards"),
    "length": ("Both engines, made pair", "tokens of every rollout"),
}
"""By part: the panel's title, and what a point is."""

FIGURES = {
    "tokens_per_s": "tokens/s",
    "step_ms": "ms a decode step",
    "scored_tokens_per_s": "tokens scored/s",
    "steps_per_s": "steps/s",
    "chunks_per_s": "chunks/s",
    "scored_ms_p50": "ms to a score, p50",
    "scored_ms_p99": "ms to a score, p99",
    "tokens_forwarded_per_token_scored": "tokens forwarded per token scored",
    "forwarded_with_start": "the same, start included",
}
_DRAWN = {"tokens_per_s": BLUE, "scored_tokens_per_s": ORANGE}
_NO_ORDER = ("workers",)  # between two of these points there is nothing
_COMPARED = ("1+1", "2+2")  # workers on the same cores
_INCHES = (5.2, 3.9)  # of a panel
_COLUMNS = 3


def tables(found: dict[str, Any]) -> str:
    """A Markdown table for each part: median and range of every figure; and what follows from the workers' runs."""
    texts = []
    for name, part in found["parts"].items():
        title, axis = TITLES[name]
        texts.append(f"{title} ({len(part['repeats'])} repeats)\n\n{_table(axis, part)}")
    if "workers" in found["parts"]:
        texts += _of_workers(found["parts"]["workers"])
    return "\n\n".join(texts)


def _table(axis: str, part: dict[str, Any]) -> str:
    names = [*part["repeats"][0][0]]
    rows = [
        [point, *(in_words([repeat[place][name] for repeat in part["repeats"]]) for name in names)]
        for place, point in enumerate(part["points"])
    ]
    return markdown([axis, *(FIGURES[name] for name in names)], rows)


def _of_workers(part: dict[str, Any]) -> list[str]:
    places = {point: place for place, point in enumerate(part["points"])}
    again = [max(one["tokens_forwarded_per_token_scored"] for one in repeat) for repeat in part["repeats"]]
    lines = [f"Most tokens forwarded per token scored, of all numbers of workers: {in_words(again)}"]
    if all(point in places for point in _COMPARED):
        few, many = (places[point] for point in _COMPARED)
        ratios = [repeat[many]["steps_per_s"] / repeat[few]["steps_per_s"] for repeat in part["repeats"]]
        lines.append(f"Steps a second, two rollout workers and two teachers / one and one: {in_words(ratios)}")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel for each part: the median, and the range of the repeats. Raises ConfigError."""
    parts = found["parts"]
    columns = min(_COLUMNS, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(_INCHES[0] * columns, _INCHES[1] * rows), layout="constrained")
    for place, (name, part) in enumerate(parts.items(), start=1):
        _draw_part(figure.add_subplot(rows, columns, place), name, part)
    save_png(figure, path, 110)


def _draw_part(axes: Any, name: str, part: dict[str, Any]) -> None:
    title, axis = TITLES[name]
    places = range(len(part["points"]))
    drawn = [figure for figure in _DRAWN if figure in part["repeats"][0][0]]
    for figure in drawn:
        spreads = [spread([repeat[place][figure] for repeat in part["repeats"]]) for place in places]
        low, middle, high = ([one[key] for one in spreads] for key in ("min", "median", "max"))
        if name in _NO_ORDER:
            axes.vlines(places, low, high, color=_DRAWN[figure], alpha=0.35, linewidth=7)
        else:
            axes.fill_between(places, low, high, color=_DRAWN[figure], alpha=0.2, linewidth=0)
        line = "none" if name in _NO_ORDER else "-"
        axes.plot(places, middle, linestyle=line, color=_DRAWN[figure], marker="o", ms=5, label=FIGURES[figure])
    axes.set_xticks(places, part["points"])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(axis)
    axes.set_ylabel("tokens/s")
    say_title(axes, title)
    plain(axes)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=12, labelcolor=INK, edgecolor=GREY)
