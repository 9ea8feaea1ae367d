"""Panels of the report on the task's terms: accuracy, length, what became of the tokens; and the look of all panels.

A panel draws into the axes it is given; its title is the finding. Where a run has nothing to show in it, it says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from common.runfiles.records import BookLine
from ops.plots import (
    ARM_COLOURS,
    GREEN,
    INK,
    PALE,
    PURPLE,
    VERMILLION,
    plain,
    say_missing,
    say_title,
)
from ops.report import data
from ops.report.run import ReportRun
from ops.stats.saving import ARMS, Saving
from ops.words import percent, short

# --- words -----------------------------------------------------------------------------------------------------------


def headline(run: ReportRun) -> str:
    """The run in one line: name, accuracy, saving."""
    curve = data.accuracy_curve(run.evaluations, data.generated_at_steps(run.lines, run.config.learner.batch_size))
    parts = []
    if curve:
        grown = f" → {percent(curve[-1].avg_at_k)}" if len(curve) > 1 else ""
        parts.append(f"accuracy {percent(curve[0].avg_at_k)}{grown}")
    if run.saving.ratio is not None:
        parts.append(_saved(run.saving))
    parts.append(f"{short(run.generated)} tokens written" if run.lines else "nothing on record yet")
    return f"Katana · {run.config.name}:  " + ", ".join(parts)


def _saved(saving: Saving) -> str:
    """Only what the interval allows to say."""
    if saving.ratio is None or saving.low is None or saving.high is None or saving.low <= 0 <= saving.high:
        return "no clear length saving"
    return f"rollouts {percent(abs(saving.ratio))} {'shorter' if saving.ratio > 0 else 'longer'} by cutting"


# --- common to the panels --------------------------------------------------------------------------------------------


# --- accuracy and length ---------------------------------------------------------------------------------------------


def draw_accuracy(axes: Any, run: ReportRun) -> None:
    """avg@k and pass@k of the evaluated versions over tokens generated."""
    marks = data.generated_at_steps(run.lines, run.config.learner.batch_size)
    curve = data.accuracy_curve(run.evaluations, marks)
    if not curve:
        why = "no eval.jsonl yet" if not run.evaluations else "the evaluated steps are not in the books yet"
        say_missing(axes, "Accuracy", why if run.config.eval.every_steps else "evaluation is off (eval.every_steps 0)")
        return
    k, problems = run.evaluations[0]["k"], run.evaluations[0]["n"]
    first, last = curve[0], curve[-1]
    gone = f" → {last.avg_at_k:.2f} in {short(last.tokens)} tokens" if len(curve) > 1 else f" at step {first.step}"
    say_title(axes, f"Accuracy: avg@{k} {first.avg_at_k:.2f}{gone}")
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
    plain(axes)


def draw_length(axes: Any, run: ReportRun, title: str = "") -> None:
    """Mean length of both arms over policy versions, with where the rule became active; its title is the saving."""
    width = data.bin_width(data.finished(run.lines))
    curves = {arm: data.length_curve(run.lines, arm, width) for arm in ARMS}
    if not any(curves.values()):
        say_missing(axes, "Length", "no finished rollout in rollouts.jsonl")
        return
    cuts = run.config.termination.policy != "none"
    finding = length_title(run.saving) if cuts else "Length: nothing is cut (policy none)"
    say_title(axes, title or finding, pad=30)
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
    plain(axes)


def draw_mean_length(axes: Any, run: ReportRun) -> None:
    """`draw_length`, for where the saving has a plot of its own: the title gives both arms' means."""
    counted = [line for line in run.lines if line.compared]
    means = {arm: [line.tokens_generated for line in counted if line.arm == arm] for arm in ARMS}
    if not all(means.values()):
        draw_length(axes, run)
        return
    treated, control = (f"{np.mean(means[arm]):.0f}" for arm in ARMS)
    draw_length(axes, run, f"Mean length while the rule is active: {treated}, control {control} tokens")


def length_title(saving: Saving) -> str:
    if saving.ratio is None or saving.low is None or saving.high is None:
        return "Length by arm: no saving to state yet"
    return f"Length saving {percent(saving.ratio)} (95 % interval {100 * saving.low:.0f} to {percent(saving.high)})"


# --- the bill --------------------------------------------------------------------------------------------------------


def draw_fates(axes: Any, lines: Sequence[BookLine]) -> None:
    """Shares of each arm's tokens that were trained on, dropped, and cut."""
    fates = {arm: data.token_fates(lines, arm) for arm in ARMS}
    fates = {arm: fate for arm, fate in fates.items() if fate.total}
    if not fates:
        say_missing(axes, "Where the tokens went", "no rollout in rollouts.jsonl")
        return
    total = sum(fate.total for fate in fates.values())
    trained = sum(fate.trained for fate in fates.values())
    axes.set_title(
        f"Of {short(total)} tokens, {percent(trained / total)} were trained on",
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
    axes.set_yticks(range(len(fates)), labels=[f"{arm}\n{short(fate.total)}" for arm, fate in fates.items()])
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
    plain(axes, grid=False)
