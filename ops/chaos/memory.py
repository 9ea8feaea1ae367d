"""Memory in a soak: resident memory over time, whether it grows, and a plot of it.

`teacher-0` and `teacher-1` are two processes of one role. A process that was killed and started again, which shows by
its pid, begins a new series: memory that it freed at its end and allocates again is not growth.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.files import write_atomically
from common.runfiles.fields import Record
from common.runfiles.lines import Lines
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION

Numbers = npt.NDArray[np.float64]
REDIS = "Redis used_memory"
MB = 1 << 20
WARM_UP_S, LEARNER_WARM_UP_S = 90.0, 300.0
BLOCK_S = 60.0
BOUND_MB, BOUND_SHARE = 8.0, 0.03
FLAT, GROWS, CANNOT_TELL = "flat", "GROWS", "cannot tell"
_LEAST_FREEDOM = 3
_LABEL_INCHES = 0.52  # two lines of text beside the axes
_NUMBERED = re.compile(r"-\d+$")
_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, INK, GREY)


def sample(pids: dict[str, int]) -> dict[str, int]:
    """Resident bytes by name; a process that has ended is left out."""
    found = {}
    for name, pid in pids.items():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if resident := re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE):  # a zombie has none
            found[name] = int(resident[1]) * 1024
    return found


@dataclass(frozen=True, slots=True)
class Sample(Record):
    """A line of the log: seconds since it began, pids and resident bytes by name, and Redis's used_memory, bytes."""

    s: float
    pid: dict[str, int]
    rss: dict[str, int]
    redis_used: int


class MemoryLog:
    """A soak's samples, appended to a file as they are taken; a former file of that name is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.monotonic()
        path.write_text("")

    def add(self, pids: dict[str, int], redis_used: int) -> None:
        """Sample these processes now. `redis_used`: used_memory of INFO memory, bytes."""
        taken = Sample(round(time.monotonic() - self._began, 3), pids, sample(pids), redis_used)
        with self.path.open("a") as file:
            file.write(json.dumps(taken.to_json()) + "\n")


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Memory of one process of a role while it lived; `s` in seconds since the log began."""

    role: str
    pid: int
    s: Numbers
    mb: Numbers


@dataclass(frozen=True, slots=True)
class Fit:
    """Growth in MB an hour, with its 95 % confidence interval."""

    slope: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Growth:
    """What a role's memory does over a soak of `hours`: `word` is FLAT, GROWS or CANNOT_TELL."""

    role: str
    processes: int
    median_mb: float
    hours: float
    bound_mb: float
    fit: Fit | None  # None: too little to fit a line to
    grown: tuple[int, ...] = ()  # pids of those that grew beyond the bound by themselves, in their own time

    @property
    def word(self) -> str:
        if self.grown or (self.fit is not None and self.fit.low * self.hours > self.bound_mb):
            return GROWS
        return FLAT if self.fit is not None and self.fit.high * self.hours <= self.bound_mb else CANNOT_TELL

    def __str__(self) -> str:
        what = f"{self.role}: {self.median_mb:.0f} MB in {self.processes} process{'es'[: 2 * (self.processes > 1)]}"
        if self.fit is None:
            return f"{what}: {self.word}, judged for too short a time"
        low, growth, high = (_signed(slope * self.hours) for slope in (self.fit.low, self.fit.slope, self.fit.high))
        return (
            f"{what}: {self.word}, {growth} MB over the soak (95 % interval {low} to {high}), "
            f"{self.bound_mb:.0f} allowed; {_signed(self.fit.slope)} MB/h"
            + "".join(f"; pid {pid} by itself" for pid in self.grown)
        )


def read_series(path: Path) -> list[Lifetime]:
    """Every process in a log, and Redis, in the order in which they came; a torn last line is left out."""
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for one in Lines(path, Sample)():
        samples = [(_role(name), one.pid[name], size) for name, size in one.rss.items()]
        samples.append((REDIS, one.pid.get("redis", 0), one.redis_used))
        for role, pid, size in samples:
            points.setdefault((role, pid), []).append((one.s, size / MB))
    return [Lifetime(role, pid, *np.array(found, np.float64).T) for (role, pid), found in points.items()]


def _role(name: str) -> str:
    return _NUMBERED.sub("", name)


def warm_up_s(role: str) -> float:
    return LEARNER_WARM_UP_S if role == "learner" else WARM_UP_S


def settled(series: Lifetime) -> Lifetime:
    """Without the first minutes of its life, as many as `warm_up_s` says.

    In that time a process loads its libraries and its model and sees its first batches, and its allocator keeps what
    the largest of them took; Redis fills up to what admission allows to be open. This ends, and is not a leak. Measured
    on the demo, on two cores with a load of 17: workers grew for a minute, and by 1 MB in the ten after it; the
    learner, whose batches have many shapes, by 60 MB in its first 100 steps, which took eight minutes, and by nothing
    in the next 100. With the cores to itself it makes these steps in three.

    What the processes of a role have in common at equal ages cannot take its place: a leak is common to them as well.
    So a soak lets them live longer than that.
    """
    late = series.s >= series.s[0] + warm_up_s(series.role)
    return Lifetime(series.role, series.pid, series.s[late], series.mb[late])


def floors(series: Lifetime) -> tuple[Numbers, Numbers]:
    """Hours and MB: the lowest sample of each block of BLOCK_S, at the mean time of its samples.

    Memory that is allocated for a batch and freed (plateaus of 15 MB for up to a minute in the learner) is above the
    floor; a leak raises the floor. A block with less than half of the samples of the fullest is left out: the lowest of
    a few samples is not low.
    """
    if not len(series.s):
        return np.empty(0), np.empty(0)
    _, block = np.unique((series.s - series.s[0]) // BLOCK_S, return_inverse=True)
    count = np.bincount(block)
    low = np.full(len(count), np.inf)
    np.minimum.at(low, block, series.mb)
    full = 2 * count >= count.max()
    return (np.bincount(block, series.s / 3600) / count)[full], low[full]


def fit(series: Sequence[Lifetime]) -> Fit | None:
    """A line by least squares through the floors of each series: its level is its own, the slope is common.

    Together these lifetimes show what none shows alone. One block is like the next, so the interval is that of
    AR(1) residuals: fewer of them count, and each counts for less. None with less than three degrees of freedom.
    """
    parts = [(hours - hours.mean(), mb - mb.mean()) for hours, mb in map(floors, series) if len(hours) > 1]
    fitted = len(parts) + 1
    freedom = sum(len(hours) for hours, _ in parts) - fitted
    if freedom < _LEAST_FREEDOM:
        return None
    hours, mb = (np.concatenate(both) for both in zip(*parts, strict=True))
    spread = float(hours @ hours)
    slope = float(hours @ mb) / spread
    residuals = [part - slope * at for at, part in parts]
    squares = sum(float(one @ one) for one in residuals)
    alike = _likeness(residuals, fitted)
    worth = (1 - alike) / (1 + alike)
    half = _t_quantile(max(_LEAST_FREEDOM, freedom * worth)) * math.sqrt(squares / freedom / spread / worth)
    return Fit(slope, slope - half, slope + half)


def _likeness(residuals: Sequence[Numbers], fitted: int) -> float:
    """Autocorrelation from one residual to the next, 0 to 0.9.

    Every parameter that was fitted takes about 1/n off what is found, which is all there is in a short life: it is put
    back, or the shortest series would promise the narrowest intervals.
    """
    squares = sum(float(one @ one) for one in residuals)
    if not squares:
        return 0.0
    found = sum(float(one[1:] @ one[:-1]) for one in residuals) / squares
    lost = fitted / sum(map(len, residuals))
    return min(max((found + lost) / (1 - lost), 0.0), 0.9)


def _t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal one; within 1 % from three degrees on."""
    z, n = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def judge(path: Path) -> list[Growth]:
    """A verdict on each role in a log, and on Redis.

    What is allowed over a soak is 3 % of the median or 8 MB, whichever is larger: an allocator that still settles, the
    feeder, which counts what it has booked. FLAT: the whole 95 % interval of the growth is within that. GROWS: the
    whole interval is beyond, so that chance alone makes it of what is flat far less often than in one of 40 cases.
    CANNOT_TELL: the interval reaches to both sides, for there is too little data; a longer soak decides. A leak that
    matters in days comes out above it in a soak of hours.

    The processes of a role are judged together, and each by itself for its lifetime: together they show what short
    lifetimes cannot, and separately they show what the others would hide.
    """
    found = read_series(path)
    if not found:
        return []
    hours = max(one.s[-1] for one in found) / 3600
    return [
        _judge_role([one for one in found if one.role == role], hours)
        for role in dict.fromkeys(one.role for one in found)
    ]


def _judge_role(lives: Sequence[Lifetime], hours: float) -> Growth:
    late = [one for one in map(settled, lives) if len(one.s)]
    median = float(np.median(np.concatenate([one.mb for one in late or lives])))
    bound = max(BOUND_MB, BOUND_SHARE * median)
    return Growth(
        role=lives[0].role,
        processes=len(lives),
        median_mb=median,
        hours=hours,
        bound_mb=bound,
        fit=fit(late),
        grown=tuple(one.pid for one in late if (own := fit([one])) and own.low * _hours(one) > bound),
    )


def _hours(series: Lifetime) -> float:
    return float(series.s[-1] - series.s[0]) / 3600


def _signed(value: float) -> str:
    """One digit after the point, always with a sign."""
    return f"{value:+.1f}".replace("-", "−")


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(target: Path, path: Path, title: str) -> None:
    """A PNG, 1200 x 800 pixels: Redis above, processes by role below; thin vertical lines where one was replaced."""
    series, verdicts = read_series(path), {verdict.role: verdict for verdict in judge(path)}
    figure = Figure(figsize=(12.0, 8.0), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.965, title, fontsize=17, fontweight="bold", color=INK, va="center", parse_math=False)
    grid = figure.add_gridspec(
        2, 1, left=0.075, right=0.7, top=0.885, bottom=0.085, hspace=0.34, height_ratios=(1, 2.1)
    )
    redis, processes = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    begun = sorted(_begun(series))
    for axes, name in ((redis, "Redis"), (processes, "Processes; thin lines: one of them was replaced")):
        axes.set_title(name, loc="left", fontsize=14, fontweight="bold", color=INK)
    _draw_panel(redis, [one for one in series if one.role == REDIS], verdicts, begun)
    _draw_panel(processes, [one for one in series if one.role != REDIS], verdicts, begun)
    processes.set_xlabel("minutes; pale: the warm-up of a process, which is not judged")
    write_atomically(target, lambda draft: figure.savefig(draft, format="png"))


def _begun(series: Sequence[Lifetime]) -> Iterator[float]:
    """When a process took the place of one of its role, in minutes."""
    first = {role: min(one.s[0] for one in series if one.role == role) for role in {one.role for one in series}}
    over = {role: min(one.s[-1] for one in series if one.role == role) for role in first}
    yield from (one.s[0] / 60 for one in series if one.s[0] > max(first[one.role], over[one.role]))


def _draw_panel(axes: Any, series: Sequence[Lifetime], verdicts: dict[str, Growth], begun: Sequence[float]) -> None:
    for minute in begun:
        axes.axvline(minute, color=GREY, linewidth=0.6, alpha=0.5, zorder=0)
    roles = sorted({one.role for one in series}, key=lambda role: -verdicts[role].median_mb)
    colours = dict(zip(roles, _COLOURS * len(roles), strict=False))
    for one in series:
        late = settled(one)
        axes.plot(one.s / 60, one.mb, color=colours[one.role], linewidth=1.2, alpha=0.35)
        axes.plot(late.s / 60, late.mb, color=colours[one.role], linewidth=1.8)
    top = 1.12 * max((float(one.mb.max()) for one in series), default=1.0)
    axes.set_ylim(0, top)
    axes.set_xlim(0, max((float(one.s[-1]) for one in series), default=60.0) / 60)
    _name_lines(axes, [(verdicts[role], colours[role]) for role in roles], top)
    axes.set_ylabel("MB", fontsize=13, color=INK)
    axes.xaxis.label.set(fontsize=13, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(labelsize=12.5, colors=INK)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _name_lines(axes: Any, named: Sequence[tuple[Growth, str]], top: float) -> None:
    """Each role with its slope beside the axes, at the height of its median or as near as the others leave room."""
    height_inches = axes.get_position().height * axes.figure.get_figheight()
    heights = _apart([verdict.median_mb / top for verdict, _ in named], _LABEL_INCHES / height_inches)
    for (verdict, colour), height in zip(named, heights, strict=True):
        line = verdict.fit
        slope = (
            f"{_signed(line.slope)} ({_signed(line.low)} … {_signed(line.high)}) MB/h"
            if line
            else "judged for too short a time"
        )
        for text, side, weight in (
            (f"{verdict.role} {verdict.median_mb:.0f} MB, {verdict.word}", 1, "bold"),
            (slope, -1, "normal"),
        ):
            axes.annotate(
                text,
                (1, height),
                xycoords="axes fraction",
                xytext=(12, 8 * side),
                textcoords="offset points",
                color=colour,
                fontsize=12,
                fontweight=weight,
                va="center",
                annotation_clip=False,
            )
        axes.annotate(
            "",
            (1, verdict.median_mb / top),
            (1.012, height),
            xycoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1},
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Falling heights, so moved that neighbours are `least` apart and none is below half of that."""
    floor = least / 2
    placed: list[float] = []
    for height in reversed(heights):
        placed.append(max(height, placed[-1] + least if placed else floor))
    return placed[::-1]
