"""Style of plots in all commands, and writing them to files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.config import ConfigError
from common.files import write_atomically

# Okabe and Ito's colours, which stay apart for the colour-blind.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"
ARM_COLOURS = {"treated": BLUE, "control": ORANGE}

# Colours of the panels that the page gives other values in a dark window, as CSS variables.
THEMED = {
    INK: "ink",
    "#000000": "ink",
    GREY: "grey",
    PALE: "pale",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    VERMILLION: "red",
    PURPLE: "purple",
    SKY: "sky",
}


@contextmanager
def font_gaps_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        # A rollout may hold characters that the font lacks; boxes in their place are all right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_png(figure: Figure, path: Path, dots_per_inch: int) -> None:
    """Write a figure atomically. Raises ConfigError."""
    with font_gaps_allowed(), named(path):
        write_atomically(path, lambda target: figure.savefig(target, format="png", dpi=dots_per_inch))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Raises ConfigError, with the path and the reason, for what cannot be written to it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from error


def say_title(axes: Any, text: str, pad: float = 10) -> None:
    axes.set_title(text, loc="left", fontsize=15, fontweight="bold", color=INK, pad=pad)


def plain(axes: Any, *, grid: bool = True) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(labelsize=12.5, colors=INK)
    axes.xaxis.label.set(fontsize=13, color=INK)
    axes.yaxis.label.set(fontsize=13, color=INK)
    if grid:
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)


def say_missing(axes: Any, title: str, why: str) -> None:
    """An empty panel with the reason."""
    say_title(axes, title)
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=14)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(PALE)
