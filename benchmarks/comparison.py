"""Figures of alternate repeats: least, median, greatest; the ratio within each repeat; as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ops.bench.speed import spread

FIGURES = {
    "seconds_a_step": "seconds a step",
    "generated_a_step": "tokens generated a step",
    "trained_a_step": "tokens trained on a step",
    "last_step_s": "seconds from the process's start to the last step",
}
SIDES = ("trl", "katana")
NAMES = {"trl": "TRL", "katana": "Katana"}


def summarize(repeats: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """From one dict for each repeat, {"trl": figures, "katana": figures}.

    The ratio is TRL's seconds a step by Katana's, taken within each repeat: 2 means that Katana is twice as fast.
    Raises ValueError without repeats.
    """
    if not repeats:
        raise ValueError("no repeats to summarize")
    return {
        **{side: {name: spread([one[side][name] for one in repeats]) for name in FIGURES} for side in SIDES},
        "ratio": spread([one["trl"]["seconds_a_step"] / one["katana"]["seconds_a_step"] for one in repeats]),
    }


def table(summary: dict[str, Any]) -> str:
    """A Markdown table of what `summarize` returned."""
    rows = [(f"{NAMES[side]}: {text}", summary[side][name]) for name, text in FIGURES.items() for side in SIDES]
    rows.insert(2, ("TRL's seconds / Katana's", summary["ratio"]))
    return markdown(["", "min", "median", "max"], [[text, *_cells(found)] for text, found in rows])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table; numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(found: dict[str, float]) -> list[str]:
    return [number(found[name]) for name in ("min", "median", "max")]


def number(value: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def in_words(values: Sequence[float]) -> str:
    """Median and range: "12 (11–13)"."""
    found = spread([*values])
    return f"{number(found['median'])} ({number(found['min'])}–{number(found['max'])})"
