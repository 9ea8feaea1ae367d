"""A few steps of a run as a picture: a row for each process, spans in colour, what is white is idle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.runfiles.tracing import ProcessTrace, TracedSpan
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, plain, save_png, say_title
from ops.trace.shares import shares_between

COLOURS = {
    "an engine step": BLUE,
    "prefill": SKY,
    "exchange": GREY,
    "scoring": PURPLE,
    "a forward": VERMILLION,
    "judging": ORANGE,
    "a micro-batch": GREEN,
    "the optimizer's step": VERMILLION,
    "publishing weights": SKY,
    "a checkpoint": PURPLE,
    "evaluating": BLUE,
}
_OTHER_WORK, _REDIS = "#B5A642", "#C4C4C4"
_WITHOUT_STEPS_US = 2_000_000  # shown where the learner has made no steps


def draw(traces: Sequence[ProcessTrace], path: Path, steps: int) -> None:
    """Write the PNG of `steps` learner steps from the middle of the run. Raises ConfigError if it cannot be written."""
    begin, end, title = _stretch(traces, steps)
    shown = [one for one in traces if one.process.at_us < end and one.end_us > begin]
    figure = Figure(figsize=(16, 1.9 + 0.95 * len(shown)), layout="constrained")
    axes: Any = figure.add_subplot()
    used: set[str] = set()
    for row, one in enumerate(shown):
        used |= _draw_row(axes, row, one, begin, end)
    axes.set_yticks(range(len(shown)), [_label(one, begin, end) for one in shown])
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_xlabel("milliseconds")
    say_title(axes, title)
    plain(axes, grid=False)
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in used]
    patches += [Patch(color=_OTHER_WORK, label="other work")] * ("other" in used)
    patches += [Patch(color=_REDIS, label="waiting for Redis's answer")] * ("redis" in used)
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False, fontsize=11.5, labelcolor=INK)
    save_png(figure, path, 110)


def _stretch(traces: Sequence[ProcessTrace], steps: int) -> tuple[int, int, str]:
    """Where to look, in microseconds, and how to call it: whole steps, each from the end of the one before."""
    done = sorted(
        (span for one in traces if one.process.role == "learner" for span in one.spans if span.span == "step"),
        key=lambda span: span.end_us,
    )
    if len(done) < 2:
        end = max(one.end_us for one in traces)
        return max(end - _WITHOUT_STEPS_US, min(one.process.at_us for one in traces)), end, "The last seconds"
    steps = min(steps, len(done) - 1)
    first = (len(done) - steps) // 2 or 1
    last = first + steps - 1
    numbers = [span.facts.get("step", 0) for span in (done[first], done[last])]
    name = f"Steps {numbers[0]} to {numbers[1]}" if steps > 1 else f"Step {numbers[0]}"
    return done[first - 1].end_us, done[last].end_us, name


def _label(trace: ProcessTrace, begin: int, end: int) -> str:
    shares = shares_between(trace, begin, end)
    return f"{trace.name}\nidle {shares.idle:.0%}, Redis {shares.redis:.0%}"


def _draw_row(axes: Any, row: int, trace: ProcessTrace, begin: int, end: int) -> set[str]:
    """Draw a process's spans, inner ones over outer ones; returns what the legend has to name."""
    used = set()
    spans = [span for span in trace.spans if span.at_us < end and span.end_us > begin]
    for colour, name, chosen in _layers(spans):
        used.add(name)
        bars = [(max(span.at_us, begin) - begin, min(span.end_us, end) - max(span.at_us, begin)) for span in chosen]
        axes.broken_barh([(at / 1e3, us / 1e3) for at, us in bars], (row - 0.36, 0.72), color=colour, linewidth=0)
    return used


def _layers(spans: Sequence[TracedSpan]) -> list[tuple[str, str, list[TracedSpan]]]:
    """Colour, name and spans, from the bottom up: unnamed work, then named work, then Redis, then prefill and forwards
    inside named work."""
    inner = ("prefill", "a forward")
    layers: list[tuple[str, str, list[TracedSpan]]] = []
    work = [span for span in spans if span.kind == "work"]
    layers.append((_OTHER_WORK, "other", [span for span in work if span.span not in COLOURS and span.span != "step"]))
    for name, colour in COLOURS.items():
        if name not in inner:
            layers.append((colour, name, [span for span in work if span.span == name]))
    layers.append((_REDIS, "redis", [span for span in spans if span.kind == "redis"]))
    layers += [(COLOURS[name], name, [span for span in work if span.span == name]) for name in inner]
    return [layer for layer in layers if layer[2]]
