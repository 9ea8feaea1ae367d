"""report.png: what a run came to, at a glance, drawn from its folder alone, whatever state the run is in.

Left: what it is for (accuracy, length); right: why (where the teacher's signal goes dead); below: the bill.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from actors.books import read_lines
from common.config import Config, ConfigError, load
from common.pretrained import ModelError, find_model, load_tokenizer
from common.weights import write_atomically
from ops import report_data as data
from ops.summary import ARMS, Saving, length_saving

SIZE_INCHES, DOTS_PER_INCH = (16.0, 10.0), 100
# Okabe and Ito's colours, which stay apart for the colour-blind.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"
ARM_COLOURS = {"treated": BLUE, "control": ORANGE}
ROWS = {"treated": 36, "control": 12}  # of the heat map
_SAMPLED_TRACES = 400
_TEXT_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Run:
    """The contents of a run's folder that the picture is made of."""

    folder: Path
    config: Config
    lines: list[data.Line]
    steps: list[data.Line]
    evaluations: list[data.Line]
    traces: dict[str, data.TraceSample]
    saving: Saving

    @property
    def generated(self) -> int:
        """Tokens generated in all rollouts on record."""
        return sum(line["tokens_generated"] for line in self.lines)


def write_report(folder: Path) -> Path:
    """Draw `report.png` into a run's folder; what is missing there, its panel says.

    Raises:
        ConfigError: the folder is no run's (it has no config.yaml), or its config cannot be read.
    """
    run = read_run(folder)
    figure = draw(run, find_decoder(run))
    target = folder / "report.png"
    with warnings.catch_warnings():
        # A rollout may hold characters that the font lacks; boxes in their place are all right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(target, lambda path: figure.savefig(path, format="png", dpi=DOTS_PER_INCH))
    return target


def read_run(folder: Path) -> Run:
    """Raises ConfigError, see `write_report`."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run's folder, there is no config.yaml; expected one like runs/demo")
    lines = list(read_lines(folder / "rollouts.jsonl"))
    return Run(
        folder=folder,
        config=load(folder / "config.yaml"),
        lines=lines,
        steps=list(read_lines(folder / "metrics.jsonl")),
        evaluations=list(read_lines(folder / "eval.jsonl")),
        traces=data.sample_traces(folder / "traces.jsonl", _SAMPLED_TRACES),
        saving=length_saving(lines),
    )


def find_decoder(run: Run) -> Callable[[list[int]], str] | None:
    """Token ids to text: by the tokenizer that the run left behind, else the student's; None where neither is found."""
    if not any(sample.traces for sample in run.traces.values()):
        return None
    try:
        own = run.folder / "model"
        folder = own if (own / "tokenizer.json").is_file() else find_model(run.config.student.model, weights=False)
        tokenizer = load_tokenizer(folder)
    except (ModelError, OSError):
        return None

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return decode


def draw(run: Run, decode: Callable[[list[int]], str] | None) -> Figure:
    """The whole picture, 1600 x 1000 pixels."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 0.965, headline(run), fontsize=19, fontweight="bold", color=INK, va="center", parse_math=False)
    left = figure.add_gridspec(2, 1, left=0.055, right=0.425, top=0.895, bottom=0.285, hspace=0.6)
    draw_accuracy(figure.add_subplot(left[0]), run)
    draw_length(figure.add_subplot(left[1]), run)
    draw_traces(figure, run, decode)
    draw_fates(figure.add_axes((0.055, 0.064, 0.37, 0.095)), run.lines)
    draw_caption(figure, run)
    return figure


# --- words ---------------------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """The run in one line: name, accuracy, saving."""
    curve = data.accuracy_curve(run.evaluations, data.generated_at_steps(run.lines, run.config.learner.batch_size))
    parts = []
    if curve:
        grown = f" → {_percent(curve[-1].avg_at_k)}" if len(curve) > 1 else ""
        parts.append(f"accuracy {_percent(curve[0].avg_at_k)}{grown}")
    if run.saving.ratio is not None:
        parts.append(_saved(run.saving))
    parts.append(f"{_tokens(run.generated)} tokens written" if run.lines else "nothing on record yet")
    return f"Katana · {run.config.name}:  " + ", ".join(parts)


def _saved(saving: Saving) -> str:
    """Only what the interval allows to say."""
    if saving.ratio is None or saving.low is None or saving.high is None or saving.low <= 0 <= saving.high:
        return "no clear length saving"
    return f"rollouts {_percent(abs(saving.ratio))} {'shorter' if saving.ratio > 0 else 'longer'} by cutting"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _tokens(count: float) -> str:
    """31,308 as 31.3 k."""
    return str(EngFormatter(places=1 if count >= 1000 else 0, sep=" ")(count))


# --- accuracy and length -------------------------------------------------------------------------------------------


def draw_accuracy(axes: Any, run: Run) -> None:
    """avg@k and pass@k of the evaluated versions over tokens generated."""
    marks = data.generated_at_steps(run.lines, run.config.learner.batch_size)
    curve = data.accuracy_curve(run.evaluations, marks)
    if not curve:
        why = "no eval.jsonl yet" if not run.evaluations else "the evaluated steps are not in the books yet"
        _say_missing(axes, "Accuracy", why if run.config.eval.every_steps else "evaluation is off (eval.every_steps 0)")
        return
    k, problems = run.evaluations[0]["k"], run.evaluations[0]["n"]
    first, last = curve[0], curve[-1]
    gone = f" → {last.avg_at_k:.2f} in {_tokens(last.tokens)} tokens" if len(curve) > 1 else f" at step {first.step}"
    _title(axes, f"Accuracy: avg@{k} {first.avg_at_k:.2f}{gone}")
    tokens = [point.tokens for point in curve]
    # The names stand at the lines' ends, apart even where the ends meet.
    middle, apart = (last.avg_at_k + last.pass_at_k) / 2, max(0.09, (last.pass_at_k - last.avg_at_k) / 2)
    middle = min(max(middle, 2 * apart - 0.01), 1 - apart)
    for name, meaning, style, values, height in (
        (f"pass@{k}", f"one of {k} right", "--", [point.pass_at_k for point in curve], middle + apart),
        (f"avg@{k}", f"mean of {k}", "-", [point.avg_at_k for point in curve], middle - apart),
    ):
        axes.plot(tokens, values, style, color=GREEN, marker="o", markersize=6, linewidth=2.2, clip_on=False)
        axes.annotate(
            f"{name} {values[-1]:.2f}\n{meaning}",
            (tokens[-1], height),
            xytext=(10, 0),
            fontsize=12.5,
            textcoords="offset points",
            color=GREEN,
            va="center",
            linespacing=1.1,
        )
    axes.set_xlim(0, 1.28 * max(tokens[-1], 1) if len(curve) > 1 else max(run.generated, 10))
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    later = len(run.evaluations) - len(curve)
    axes.set_xlabel("tokens generated so far" + (f" ({later} later evaluations: not booked yet)" if later else ""))
    axes.set_ylabel(f"share right, {problems} problems")
    _plain(axes)


def draw_length(axes: Any, run: Run) -> None:
    """Mean length of both arms over policy versions, with where the rule became active."""
    width = data.bin_width(data.finished(run.lines))
    curves = {arm: data.length_curve(run.lines, arm, width) for arm in ARMS}
    if not any(curves.values()):
        _say_missing(axes, "Length", "no finished rollout in rollouts.jsonl")
        return
    cuts = run.config.termination.policy != "none"
    _title(axes, _length_title(run.saving) if cuts else "Length: nothing is cut (policy none)", pad=30)
    for arm, curve in curves.items():
        versions = [point.version for point in curve]
        tokens = np.array([point.tokens for point in curve])
        half = np.array([point.half_width for point in curve])
        axes.fill_between(versions, tokens - half, tokens + half, color=ARM_COLOURS[arm], alpha=0.16, linewidth=0)
        meaning = f" ({'may' if arm == 'treated' else 'never'} be cut)" if cuts else ""
        axes.plot(
            versions,
            tokens,
            color=ARM_COLOURS[arm],
            marker="os"[arm == "control"],
            markersize=5,
            linewidth=2.2,
            label=arm + meaning,
        )
    began = data.active_from(run.lines)
    newest = max(point.version for curve in curves.values() for point in curve)
    if began is not None and cuts:
        axes.axvline(began, color=INK, linewidth=1.2, linestyle=":")
        axes.annotate(
            f" rule active from version {began} ",
            (began, 0.97),
            xycoords=("data", "axes fraction"),
            va="top",
            ha="left" if began <= newest / 2 else "right",
            fontsize=12.5,
            color=INK,
        )
    axes.legend(
        frameon=False,
        fontsize=12.5,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.97),
        borderaxespad=0,
        ncol=2,
        labelcolor=INK,
    )
    # Not up to the widest interval: a bin of three rollouts would press all curves flat.
    axes.set_ylim(0, 1.4 * max(point.tokens for curve in curves.values() for point in curve))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("policy version that wrote the last token")
    axes.set_ylabel("tokens a rollout")
    _plain(axes)


def _length_title(saving: Saving) -> str:
    if saving.ratio is None or saving.low is None or saving.high is None:
        return "Length by arm: no saving to state yet"
    return f"Length saving {_percent(saving.ratio)} (95 % interval {100 * saving.low:.0f} to {_percent(saving.high)})"


# --- divergence along rollouts -------------------------------------------------------------------------------------


def draw_traces(figure: Figure, run: Run, decode: Callable[[list[int]], str] | None) -> None:
    """Heat map of rollouts, and beneath it one of each arm as a curve; all over the same token positions."""
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
        _say_missing(heat, "Divergence along rollouts", "no traces.jsonl (feeder.record_traces)")
        return
    width = data.shown_width(rows)
    _draw_heat(figure, heat, groups, width)
    heat.set_autoscalex_on(False)  # what lies under it shares its positions
    _title(heat, _heat_title(run), pad=34 if cut else 10)
    if not cut:
        heat.set_xlabel("token position", fontsize=13, color=INK)
        return
    _draw_sides(heat, run)
    above = figure.add_subplot(grid[1], sharex=heat)
    examples = [above, figure.add_subplot(grid[2], sharex=heat, sharey=above)]
    for axes, arm in zip(examples, ARMS, strict=True):
        _draw_example(axes, data.typical(run.traces[arm].traces), arm, run.config.termination.window, decode)
    above.tick_params(labelbottom=False)
    examples[1].set_xlabel("token position")
    _legend_of_examples(figure)


def _heat_title(run: Run) -> str:
    if not run.traces["treated"].found:
        return "No rollout was cut: divergence along some of them"
    cut, judged = data.cut_share(run.lines)
    where = "Cut where the teacher agrees" if run.config.termination.policy == "kat" else "Cut"
    return f"{where}: " + (f"{cut:,} of {judged:,} rollouts" if judged else f"{run.traces['treated'].found:,} rollouts")


def _draw_sides(axes: Any, run: Run) -> None:
    """What the rule saw, and what came after it where nothing was stopped: whether the signal was dead for good."""
    before, noticed, _ = data.mean_divergences(run.traces["treated"].traces)
    _, _, behind = data.mean_divergences(run.traces["control"].traces)
    known = {"kept": before, "cut to trigger": noticed, "control, going on": behind}
    text = " · ".join(f"{name} {value:.2g}" for name, value in known.items() if value is not None)
    axes.text(0, 1.045, f"mean nats a token:  {text}", transform=axes.transAxes, fontsize=12.5, color=GREY)


def _draw_heat(figure: Figure, axes: Any, groups: Sequence[Sequence[data.Trace]], width: int) -> None:
    gap = 2 if all(groups) else 0
    image = np.concatenate(
        [data.heat_map(groups[0], width), np.full((gap, width), np.nan), data.heat_map(groups[1], width)]
    )
    low, high = np.nanquantile(image, [0.02, 0.98])
    shown = axes.imshow(
        image,
        aspect="auto",
        cmap="cividis",
        vmin=low,
        vmax=high,
        interpolation="nearest",
        extent=(0, width, len(image), 0),
    )
    places = [*range(len(groups[0])), *range(len(groups[0]) + gap, len(image))]
    for row, trace in zip(places, [*groups[0], *groups[1]], strict=True):
        if trace.keep < len(trace.divergence):
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
    box = axes.get_position()
    bar = figure.colorbar(shown, cax=figure.add_axes((box.x1 + 0.012, box.y0, 0.01, box.height)))
    exponents = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    bar.set_ticks(list(exponents), labels=[f"{10.0**exponent:g}" for exponent in exponents])
    bar.ax.tick_params(labelsize=12, colors=INK)
    bar.set_label("divergence $d_t$, nats", fontsize=12.5, color=INK)
    bar.outline.set_visible(False)


def _label_groups(axes: Any, groups: Sequence[Sequence[data.Trace]], gap: int) -> None:
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
    axes: Any, trace: data.Trace | None, arm: str, window: int, decode: Callable[[list[int]], str] | None
) -> None:
    """One rollout: divergence, window mean, threshold, keep, trigger, and its text around the cut."""
    if trace is None:
        axes.text(
            0.5,
            0.5,
            f"no {arm} rollout in which the rule fired",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=GREY,
            fontsize=13,
        )
        axes.set_yticks([])
        _plain(axes)
        return
    places = np.arange(1, len(trace.divergence) + 1)
    axes.plot(places, np.maximum(trace.divergence, data.FLOOR_NATS), color=SKY, linewidth=0.9)
    means = np.maximum(data.window_means(trace.divergence, window), data.FLOOR_NATS)
    axes.plot(places, means, color=BLUE, linewidth=2)
    if trace.threshold is not None:
        axes.axhline(trace.threshold, color=INK, linewidth=1.1, linestyle="--")
        axes.fill_between(
            places, means, trace.threshold, where=means < trace.threshold, color=VERMILLION, alpha=0.35, linewidth=0
        )
    axes.axvline(trace.keep, color=VERMILLION, linewidth=2.4)
    axes.axvline(trace.trigger, color=INK, linewidth=1.4, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("nats")
    label = f"{arm}, {'stopped' if arm == 'treated' else 'not stopped'}: "
    parts = cut_parts(trace, decode)
    _write_parts(axes, [(label, INK, "DejaVu Sans"), *parts])
    _plain(axes)


def cut_parts(trace: data.Trace, decode: Callable[[list[int]], str] | None) -> list[tuple[str, str, str]]:
    """The text around the cut as (text, colour, font family); the rollout's id where it cannot be decoded."""
    if decode is None:
        return [(f"{trace.rid}, {trace.keep} tokens kept", GREY, "DejaVu Sans")]
    texts = data.cut_text(trace, decode, _TEXT_CHARACTERS)
    colours = (INK, VERMILLION, GREY)
    parts = [(text, colour, "DejaVu Sans Mono") for text, colour in zip(texts, colours, strict=True)]
    return [*parts[:1], ("✂", VERMILLION, "DejaVu Sans"), *parts[1:]]


def _write_parts(axes: Any, parts: Iterable[tuple[str, str, str]]) -> None:
    """Pieces of different colours on one line above the axes."""
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


def _legend_of_examples(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=SKY, linewidth=1.2, label="$d_t$"),
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


# --- the bill ------------------------------------------------------------------------------------------------------


def draw_fates(axes: Any, lines: Sequence[data.Line]) -> None:
    """Shares of each arm's tokens that were trained on, dropped, and cut."""
    fates = {arm: data.token_fates(lines, arm) for arm in ARMS}
    fates = {arm: fate for arm, fate in fates.items() if fate.total}
    if not fates:
        _say_missing(axes, "Where the tokens went", "no rollout in rollouts.jsonl")
        return
    total = sum(fate.total for fate in fates.values())
    trained = sum(fate.trained for fate in fates.values())
    axes.set_title(
        f"Of {_tokens(total)} tokens, {_percent(trained / total)} were trained on",
        loc="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
        pad=28,
    )
    names = ("trained on", "kept, not trained on", "detection", "overshoot")
    colours = (GREEN, PALE, VERMILLION, PURPLE)
    counts = np.array([[fate.trained, fate.unused, fate.detection, fate.overshoot] for fate in fates.values()])
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    for column in np.flatnonzero(shares.any(axis=0)):
        lefts = shares[:, :column].sum(axis=1)
        axes.barh(
            range(len(fates)), shares[:, column], left=lefts, color=colours[column], height=0.7, label=names[column]
        )
        for place, (left, share) in enumerate(zip(lefts, shares[:, column], strict=True)):
            if share >= 8:
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=12.5,
                    color=INK if colours[column] == PALE else "white",
                    fontweight="bold",
                )
    axes.set_yticks(range(len(fates)), labels=[f"{arm}\n{_tokens(fate.total)}" for arm, fate in fates.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the arm's tokens (detection: cut to trigger; overshoot: behind it)")
    axes.legend(
        ncol=4,
        frameon=False,
        fontsize=12,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.96),
        borderaxespad=0,
        handlelength=0.9,
        handletextpad=0.4,
        columnspacing=1.0,
    )
    _plain(axes, grid=False)


def draw_caption(figure: Figure, run: Run) -> None:
    """What was run, in small print."""
    config = run.config
    done = run.steps[-1]["step"] if run.steps else 0
    entries = [
        (
            "run",
            f"{config.name}: {done} of {config.learner.max_steps} steps of {config.learner.batch_size}, task "
            f"{config.data.task}, at most {config.rollout.max_completion_length} tokens",
        ),
        ("models", f"{Path(config.student.model).name} learns from {Path(config.teacher.model).name}"),
        ("policy", data.policy_text(config, run.lines)),
        ("finished", data.reasons_text(run.lines)),
        ("ledger", data.ledger_text(run.folder / "ledger.json")),
    ]
    height = 0.152
    for name, text in entries:
        figure.text(0.465, height, name, fontsize=12.5, color=GREY)
        for line in wrap(text, 80):
            figure.text(0.522, height, line, fontsize=12.5, color=INK, parse_math=False)
            height -= 0.024


# --- common to the panels ------------------------------------------------------------------------------------------


def _title(axes: Any, text: str, pad: float = 10) -> None:
    axes.set_title(text, loc="left", fontsize=15, fontweight="bold", color=INK, pad=pad)


def _plain(axes: Any, *, grid: bool = True) -> None:
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


def _say_missing(axes: Any, title: str, why: str) -> None:
    """An empty panel that says why it is empty."""
    _title(axes, title)
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=14)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(PALE)
