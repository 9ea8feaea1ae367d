"""The dashboards' panels on one page, without Grafana: `katana panels PROMETHEUS --run NAME --out FILE`.

All data come from Prometheus's HTTP API; the expressions are those of ops/monitoring/dashboards.py.
"""

from __future__ import annotations

import http.client
import io
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from common.config import ConfigError
from common.files import write_atomically
from ops.monitoring.dashboards import DASHBOARDS, RATE_INTERVAL, Panel, PanelRow, Query, of
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION

_TIMEOUT_S = 10.0
_SCRAPE_S = 5.0  # the interval of ops/prometheus; a rate needs several scrapes
_POINTS = 240  # of a line
_LARGEST = 1e30  # larger values, +Inf too, cannot be drawn
# Prometheus is on this machine or in the cluster's network: ignore the environment's proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, "#8C6D31", "#444444")


# --- Prometheus ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """A time range: begin and end in unix seconds, and the seconds between two points."""

    begin_s: float
    end_s: float
    step_s: float

    @property
    def rate_interval(self) -> str:
        """The value that Grafana would use for `$__rate_interval`."""
        return f"{math.ceil(max(self.step_s + _SCRAPE_S, 4 * _SCRAPE_S))}s"


@dataclass(frozen=True, slots=True)
class Readings:
    """One series of Prometheus: its labels, moments (unix seconds [N]) and readings ([N]; NaN for none)."""

    labels: dict[str, str]
    times_s: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PanelSeries:
    """One line of a panel: its name, its moments (unix seconds [N]) and its readings ([N]; NaN for none)."""

    legend: str
    times_s: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]
    reference: bool

    @property
    def last(self) -> float | None:
        """The newest reading; None if there was none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else None


class Prometheus:
    """A running Prometheus, over HTTP. Every query raises ConfigError if it gets no answer."""

    def __init__(self, url: str) -> None:
        if not re.match(r"https?://[^/\s]", url):
            raise ConfigError(f"{url!r}: expected the address of a Prometheus, for example http://127.0.0.1:9090")
        self._url = url.rstrip("/")

    def matrix(self, expr: str, span: Span) -> list[Readings]:
        """An expression's readings over a time range, checked: only readings of that range are returned."""
        question = {"query": expr, "start": span.begin_s, "end": span.end_s, "step": span.step_s}
        found = self._ask("/api/v1/query_range", question)
        if not isinstance(found, dict) or not isinstance(found.get("result"), list):
            raise ConfigError(f"{self._url}: no readings in the answer to {expr!r}; is it a Prometheus?")
        try:
            return [_readings(series, span) for series in found["result"]]
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{self._url}: the answer to {expr!r} is not one of a Prometheus: {error}") from error

    def runs(self) -> list[str]:
        """Names of the runs that are known."""
        found = self._ask("/api/v1/label/run/values", {"match[]": "katana_rollouts_open"})
        return sorted(map(str, found)) if isinstance(found, list) else []

    def _ask(self, path: str, question: dict[str, Any]) -> Any:
        request = f"{self._url}{path}?{urllib.parse.urlencode(question)}"
        try:
            raw = _fetched(request)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(f"{self._url}: no Prometheus answers there ({error})") from error
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._url}: the server there is not a Prometheus (the answer is not JSON)") from error
        if not isinstance(found, dict) or found.get("status") != "success":
            reason = found.get("error", "no reason given") if isinstance(found, dict) else "not an object"
            raise ConfigError(f"{self._url}: {path} was refused: {reason!s:.300}")
        return found.get("data")


def _fetched(request: str) -> bytes:
    """The body, also of an error: Prometheus describes errors in JSON."""
    try:
        answer = _OPENER.open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as refused:
        answer = refused
    with answer:
        raw: bytes = answer.read()
    return raw


def _readings(series: Any, span: Span) -> Readings:
    """One series of an answer, `{"metric": {label: value}, "values": [[unix_s, "reading"], …]}`. Raises ValueError."""
    if not isinstance(series, dict):
        raise ValueError(f"{series!r:.60} is not a series")
    labels, values = series.get("metric"), series.get("values")
    if not isinstance(labels, dict) or not isinstance(values, list):
        raise ValueError(f"a series without metric or values: {series!r:.60}")
    points = np.array([_point(pair, span) for pair in values], dtype=np.float64).reshape(-1, 2)
    return Readings({str(name): str(value) for name, value in labels.items()}, points[:, 0], points[:, 1])


def _point(pair: Any, span: Span) -> tuple[float, float]:
    """A moment within the range and a reading; NaN for one that cannot be drawn, such as +Inf. Raises ValueError."""
    match pair:
        case [int() | float() as at, str() as value] if not isinstance(at, bool):
            moment, reading = float(at), float(value)
        case _:
            raise ValueError(f"{pair!r:.60} is not [time, reading]")
    if not span.begin_s - span.step_s <= moment <= span.end_s + span.step_s:
        raise ValueError(f"a reading of {moment:g}, asked for {span.begin_s:.0f} to {span.end_s:.0f}")
    return moment, reading if abs(reading) < _LARGEST else math.nan


def find_span(prometheus: Prometheus, run: str, minutes: float) -> Span:
    """The part of the last minutes in which a run's feeder was scraped. Raises ConfigError if there is none."""
    now = time.time()
    back = Span(now - 60 * minutes, now, max(1.0, 60 * minutes / 1000))
    found = prometheus.matrix(filled(f"count({of('rollouts_open')})", run, back), back)
    moments = [moment for one in found for moment in one.times_s.tolist()]
    if not moments:
        known = ", ".join(prometheus.runs()) or "none"
        raise ConfigError(f"run {run!r}: no data in the last {minutes:g} minutes; runs known there: {known}")
    begin, end = min(moments) - back.step_s, max(moments) + back.step_s
    return Span(begin, end, max(1.0, (end - begin) / _POINTS))


def filled(expr: str, run: str, span: Span) -> str:
    """An expression of the dashboards with its variables filled in."""
    quoted = run.replace("\\", "\\\\").replace('"', '\\"')
    return expr.replace("$run", quoted).replace(RATE_INTERVAL, span.rate_interval)


def ask(prometheus: Prometheus, query: Query, run: str, span: Span) -> list[PanelSeries]:
    """The series of one expression."""
    series = [
        PanelSeries(_named(query.legend, one.labels), one.times_s, one.values, query.reference)
        for one in prometheus.matrix(filled(query.expr, run, span), span)
    ]
    return sorted(series, key=lambda one: one.legend)


def _named(legend: str, labels: dict[str, str]) -> str:
    """The legend with labels filled in; `all` if it is empty."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), legend).strip() or "all"


def seen(series: Sequence[PanelSeries]) -> bool:
    """Whether there is anything to draw."""
    return any(one.last is not None for one in series if not one.reference)


# --- the page ------------------------------------------------------------------------------------------------------

# Inches. Sections are in two halves, so that the page is about as high as it is wide.
_HALF, _MARGIN, _GAP = 9.3, 0.25, 0.4
_WIDTH = 2 * (_MARGIN + _HALF) + _GAP
_TITLE, _HEADING, _FOOT = 0.65, 0.45, 0.3
_HEIGHTS = {"stat": 1.05, "timeseries": 2.3}
_BESIDE = {"stat": 4, "timeseries": 3}  # panels of a kind in one line
_DOTS_PER_INCH = 100
_Filled = tuple[Panel, list[PanelSeries]]


@dataclass(frozen=True, slots=True)
class FilledRow:
    """A row of a dashboard with the data of its panels; panels without data are named at its foot."""

    row: PanelRow
    shown: list[_Filled]
    empty: list[str]

    @property
    def lines(self) -> list[list[_Filled]]:
        """Panels of one line each; single figures are not as high as curves, so they do not mix."""
        found = []
        for kind, beside in _BESIDE.items():
            same = [one for one in self.shown if one[0].kind == kind]
            found += [same[place : place + beside] for place in range(0, len(same), beside)]
        return found

    @property
    def height(self) -> float:
        """In inches."""
        return _HEADING + sum(_HEIGHTS[line[0][0].kind] for line in self.lines) + (_FOOT if self.empty else 0)


def draw(url: str, run: str, out: Path, minutes: float = 60.0) -> Path:
    """Draw every panel's data of one run into a PNG; returns the file.

    Args:
        url: the Prometheus, for example http://127.0.0.1:9090
        run: the run's name
        out: the file
        minutes: how far back to look; only the part in which the run was scraped is drawn

    Raises:
        ConfigError: no Prometheus answers, it has no data of the run in that time, or the file cannot be written.
    """
    prometheus = Prometheus(url)
    span = find_span(prometheus, run, minutes)
    sections = [ask_row(prometheus, row, run, span) for board in DASHBOARDS for row in board.rows]
    figure = page(sections, run, span)
    try:
        write_atomically(out, lambda path: _save(figure, path))
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from error
    return out


def _save(figure: Figure, path: Path) -> None:
    """Save with a palette: a third of the bytes, and no visible difference."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(path, format="PNG", optimize=True)


def ask_row(prometheus: Prometheus, row: PanelRow, run: str, span: Span) -> FilledRow:
    """The data of a row's panels."""
    data = [
        (panel, [one for query in panel.queries for one in ask(prometheus, query, run, span)]) for panel in row.panels
    ]
    empty = [panel.title for panel, series in data if not seen(series)]
    return FilledRow(row, [(panel, series) for panel, series in data if seen(series)], empty)


def page(sections: list[FilledRow], run: str, span: Span) -> Figure:
    """The whole page."""
    halves = _halves(sections)
    height = _TITLE + max(sum(section.height for section in half) for half in halves) + _MARGIN
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(span.begin_s))
    minutes = (span.end_s - span.begin_s) / 60
    title = f"Katana · {run}:  {minutes:.1f} minutes from {began} UTC, from Prometheus"
    _write(figure, _MARGIN, height - 0.34, title, fontsize=18, fontweight="bold")
    for place, half in enumerate(halves):
        top = height - _TITLE
        for section in half:
            _draw_section(figure, section, span, _MARGIN + place * (_HALF + _GAP), top)
            top -= section.height
    return figure


def _halves(sections: list[FilledRow]) -> tuple[list[FilledRow], list[FilledRow]]:
    """The sections in their order, in two halves as equal in height as possible."""

    def height(place: int) -> float:
        return max(sum(one.height for one in half) for half in (sections[:place], sections[place:]))

    place = min(range(len(sections) + 1), key=height)
    return sections[:place], sections[place:]


def _draw_section(figure: Figure, section: FilledRow, span: Span, left: float, top: float) -> None:
    """A heading, then lines of panels; `left` and `top` in inches from the page's lower left corner."""
    _write(figure, left, top - 0.2, section.row.title, fontsize=14, fontweight="bold", color=BLUE)
    figure.add_artist(_rule(figure, left, top - 0.37))
    top -= _HEADING
    for line in section.lines:
        kind = line[0][0].kind
        width, height = _HALF / _BESIDE[kind], _HEIGHTS[kind]
        for column, (panel, series) in enumerate(line):
            box = (left + column * width, top - height, width, height)
            if kind == "stat":
                _draw_figure(figure, panel, series, box)
            else:
                _draw_curves(figure, panel, series, span, box)
        top -= height
    if section.empty:
        text = f"no data in this time range: {', '.join(section.empty)}"
        _write(figure, left, top - 0.12, text, fontsize=9.5, color=GREY)


def _write(figure: Figure, left: float, y: float, text: str, **look: Any) -> None:
    """Text that begins at `left`, vertically centred at `y`, in inches."""
    height = figure.get_figheight()
    figure.text(left / _WIDTH, y / height, text, **{"color": INK, "va": "center", "parse_math": False, **look})


def _rule(figure: Figure, left: float, y: float) -> Line2D:
    sides, height = [left / _WIDTH, (left + _HALF) / _WIDTH], y / figure.get_figheight()
    return Line2D(sides, [height, height], color=PALE, linewidth=1, transform=figure.transFigure)


_Box = tuple[float, float, float, float]  # left, bottom, width, height in inches


def _draw_figure(figure: Figure, panel: Panel, series: list[PanelSeries], box: _Box) -> None:
    """The newest reading, large."""
    left, bottom, _, height = box
    reading = next(one.last for one in series if one.last is not None)
    colour = VERMILLION if _bad(panel, reading) else INK
    _write(figure, left, bottom + height - 0.2, panel.title, fontsize=11, fontweight="bold")
    _write(figure, left, bottom + height - 0.6, _formatted(reading, panel.unit), fontsize=25, color=colour)


def _bad(panel: Panel, reading: float) -> bool:
    if panel.alarm is None:
        return False
    return reading < panel.alarm if panel.alarm_below else reading >= panel.alarm


def _draw_curves(figure: Figure, panel: Panel, series: list[PanelSeries], span: Span, box: _Box) -> None:
    left, bottom, width, height = box
    page_height = figure.get_figheight()
    unit = panel.unit.removeprefix("suffix:").strip() if panel.unit.startswith("suffix:") else ""
    title = panel.title + (f", {unit}" if unit else "")
    _write(figure, left, bottom + height - 0.2, title, fontsize=11, fontweight="bold")
    # Margins: for the readings at the left, for title and legend at the top, for the minutes at the bottom.
    axes = figure.add_axes(
        (
            (left + 0.5) / _WIDTH,
            (bottom + 0.4) / page_height,
            (width - 0.75) / _WIDTH,
            (height - 1.08) / page_height,
        )
    )
    _plot(axes, panel, series, span)
    _scale(axes, panel, series, span)
    _draw_legend(axes, series)


def _plot(axes: Any, panel: Panel, series: list[PanelSeries], span: Span) -> None:
    lines = [one for one in series if not one.reference and one.last is not None]
    if panel.stacked:
        _stack(axes, lines, span)
    else:
        for one, colour in zip(lines, _cycled(len(lines)), strict=True):
            axes.plot(_minutes(one, span), one.values, color=colour, linewidth=1.5, label=one.legend)
    for one in series:
        if one.reference and one.last is not None:
            axes.plot(_minutes(one, span), one.values, color=INK, linewidth=1, linestyle="--", label=one.legend)


def _stack(axes: Any, lines: list[PanelSeries], span: Span) -> None:
    """Stacked areas; a line without a reading at a moment counts as 0 there."""
    moments = np.unique(np.concatenate([one.times_s for one in lines]))
    heights = np.zeros((len(lines), len(moments)))
    for row, one in enumerate(lines):
        heights[row, np.searchsorted(moments, one.times_s)] = np.nan_to_num(one.values)
    axes.stackplot(
        (moments - span.begin_s) / 60,
        heights,
        colors=_cycled(len(lines)),
        labels=[one.legend for one in lines],
        alpha=0.75,
        linewidth=0,
    )


def _cycled(count: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(count)]


def _minutes(series: PanelSeries, span: Span) -> npt.NDArray[np.float64]:
    minutes: npt.NDArray[np.float64] = (series.times_s - span.begin_s) / 60
    return minutes


def _scale(axes: Any, panel: Panel, series: list[PanelSeries], span: Span) -> None:
    axes.set_xlim(0, (span.end_s - span.begin_s) / 60)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        low, high = axes.get_ylim()
        flat = not any(np.nanmax(np.abs(one.values)) for one in series if one.last is not None)
        axes.set_ylim(low if panel.signed else 0, min(1.0 if flat else high, panel.top or math.inf))
    readings = FuncFormatter(lambda reading, _: _formatted(reading, panel.unit, axis=True))
    axes.yaxis.set_major_formatter(readings)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minute, _: f"{minute:g} min"))
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    if panel.alarm is not None and axes.get_ylim()[1] >= panel.alarm:
        axes.axhline(panel.alarm, color=VERMILLION, linewidth=1, linestyle=":")


def _draw_legend(axes: Any, series: list[PanelSeries]) -> None:
    """Between title and curves, in as few lines as its names need; from the third line on the curves get less room."""
    names = [one.legend for one in series if one.last is not None]
    figure = axes.figure
    widest = 1.28 * axes.get_window_extent().width
    for columns in range(len(names), 0, -1):
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.21, 1.0),
            borderaxespad=0.2,
            ncol=columns,
            fontsize=8.5,
            frameon=False,
            handlelength=1.1,
            handletextpad=0.4,
            columnspacing=1.0,
            labelspacing=0.2,
            labelcolor=INK,
        )
        if legend.get_window_extent(figure.canvas.get_renderer()).width <= widest:
            break
    further = max(0, math.ceil(len(names) / columns) - 2)
    box = axes.get_position()
    lower = 0.15 * further / figure.get_figheight()
    axes.set_position((box.x0, box.y0, box.width, box.height - lower))


def _formatted(reading: float, unit: str, *, axis: bool = False) -> str:
    """A reading in one of Grafana's units; on an axis the unit of a `suffix:` is in the title."""
    if unit == "percentunit":
        return f"{100 * reading:.3g} %" if axis else f"{100 * reading:.1f} %"
    if unit in _PREFIXED:
        return _engineered(reading, _PREFIXED[unit], axis)
    suffix = "" if axis or unit == "short" else unit.removeprefix("suffix:").strip()
    return f"{reading:.3g} {suffix}".strip() if abs(reading) < 1000 else _engineered(reading, suffix, axis)


_PREFIXED = {"s": "s", "bytes": "B", "Bps": "B/s", "ops": "/s"}  # 0.001 s is 1 ms


def _engineered(reading: float, unit: str, axis: bool) -> str:
    return str(EngFormatter(unit=unit, places=None if axis else 1, sep=" ")(reading)).strip()
