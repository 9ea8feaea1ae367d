"""Panels of the report on how a run went along: saving, threshold, firing, reasons, staleness, latencies, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from common.policies import unit_of
from common.runfiles.lines import Object
from ops.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, plain, say_missing, say_title
from ops.report import data, series
from ops.report.panels import length_title
from ops.report.run import ReportRun
from ops.stats import endings
from ops.stats.saving import ARMS
from ops.words import fired_word, percent

_REASON_COLOURS = {"eos": GREEN, "length": ORANGE, "kl_trap": VERMILLION, "fixed": PURPLE, "random": SKY}
_OTHER_COLOURS = (BLUE, PURPLE, SKY, GREY, PALE)
_NEITHER = "no rollout in rollouts.jsonl"


def draw_saving(axes: Any, run: ReportRun) -> None:
    """The length saving over all booked so far, with its 95 % interval, over tokens generated."""
    curve = series.saving_curve(run.lines, run.saving)
    if not curve:
        no_arm = run.config.termination.control_fraction == 0
        why = "there is no control arm" if no_arm else "no rollouts of both arms yet that the policy could have cut"
        say_missing(axes, "Length saving", "nothing is cut (policy none)" if _cuts_nothing(run) else why)
        return
    say_title(axes, length_title(run.saving))
    tokens = [point.tokens for point in curve]
    low, high = [point.low for point in curve], [point.high for point in curve]
    axes.fill_between(tokens, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(tokens, [point.ratio for point in curve], color=BLUE, linewidth=2.2, marker="o", markersize=4)
    axes.axhline(0, color=INK, linewidth=1)
    # The first intervals are of a few rollouts; they may not press the rest flat.
    ends = [*low[len(low) // 3 :], *high[len(high) // 3 :], 0.0]
    room = 0.1 * (max(ends) - min(ends)) or 0.1
    axes.set_ylim(min(ends) - room, max(ends) + room)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("1 − treated / control")
    axes.legend(frameon=False, fontsize=12, loc="best", labelcolor=INK)
    _over_tokens(axes, run)


def _cuts_nothing(run: ReportRun) -> bool:
    return run.config.termination.policy == "none"


def draw_threshold(figure: Figure, run: ReportRun) -> None:
    """The threshold, and beneath it how many of the rollouts that could be cut were; over the same tokens."""
    above, below = _two_rows(figure)
    tokens, values = series.threshold_curve(run.lines)
    policy = run.config.termination.policy
    if len(tokens) and unit_of(policy) == "nats":
        say_title(above, f"Threshold: {values[0]:.2g} → {values[-1]:.2g} nats")
        above.plot(tokens, values, color=INK, linewidth=1.8, drawstyle="steps-post")
        above.set_ylim(0, 1.25 * values.max() or 1)
        above.set_ylabel("nats")
        _over_tokens(above, run)
        above.set_xlabel("")
    else:
        say_missing(above, "Threshold", "never active" if policy.startswith("kat") else f"policy {policy} has none")
    _draw_cut_rate(below, run)


def _draw_cut_rate(axes: Any, run: ReportRun) -> None:
    curve = series.fired_curve(run.lines)
    if not curve:
        say_missing(axes, "Cut rate", "no rollout that could have been cut")
        return
    fired, judged = data.fired_share(run.lines)
    say_title(axes, f"{fired_word(run.config)}: {percent(fired / judged)} of {judged:,} treated rollouts")
    tokens, shares = [point.tokens for point in curve], [point.share for point in curve]
    low, high = [point.low for point in curve], [point.high for point in curve]
    axes.fill_between(tokens, low, high, color=VERMILLION, alpha=0.16, linewidth=0)
    axes.plot(tokens, shares, color=VERMILLION, linewidth=2.2, marker="o", markersize=4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("policy fired")
    _over_tokens(axes, run)


def draw_reasons(figure: Figure, run: ReportRun) -> None:
    """Why rollouts of each arm ended, as shares over tokens generated."""
    upper, lower = _two_rows(figure, right=0.8)
    mixes = {arm: series.reasons_mix(run.lines, arm) for arm in ARMS}
    names = list(dict.fromkeys(reason for mix in mixes.values() for reason in mix.counts))
    rest = iter(_OTHER_COLOURS * (1 + len(names)))
    colours = {name: _REASON_COLOURS.get(name) or next(rest) for name in names}
    for axes, (arm, mix) in zip((upper, lower), mixes.items(), strict=True):
        if not mix.counts:
            say_missing(axes, f"Why {arm} rollouts ended", f"no {arm} rollout in rollouts.jsonl")
            continue
        first = next(iter(mix.counts))
        share = mix.counts[first] / sum(mix.counts.values())
        say_title(axes, f"{arm.capitalize()}: {percent(share)} ended by {first[:40]}")
        # One bin is a point: drawn as wide as the run.
        tokens = np.array([0.0, run.generated]) if len(mix.tokens) == 1 else mix.tokens
        bottom = np.zeros(len(tokens))
        for reason, shares in mix.shares.items():
            top = bottom + shares
            axes.fill_between(tokens, bottom, top, color=colours[reason], linewidth=0, label=f"{reason[:40]}")
            bottom = top
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("share")
        _over_tokens(axes, run)
        axes.legend(frameon=False, fontsize=12, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    upper.set_xlabel("")


def draw_staleness(figure: Figure, run: ReportRun) -> None:
    """How stale trajectories were, and how staleness went step by step against the limit."""
    left, right = _two_columns(figure)
    _draw_ages(left, run)
    _draw_ages_by_step(right, run)


def _draw_ages(axes: Any, run: ReportRun) -> None:
    counts = series.staleness_counts(run.lines)
    total = sum(seen.total() for seen in counts.values())
    if not total:
        say_missing(axes, "Staleness", "no trajectory was trained on or dropped as stale yet")
    else:
        dropped = counts["dropped"].total()
        say_title(axes, f"Staleness: {percent(dropped / total)} dropped" if dropped else "Staleness: none dropped")
        ended = endings.by_ending(run.lines)
        for name, fate, colour in (("trained", "trained", GREEN), ("dropped", "stale", VERMILLION)):
            ages = sorted(counts[name])
            if ages:
                label = f"{name}: {_mean_length(ended[fate])}" if dropped else name
                axes.bar(ages, [counts[name][age] for age in ages], color=colour, width=0.8, label=label)
        limit, top = run.config.learner.max_staleness + 0.5, 0.68 if dropped else 1.0  # beneath the legend
        axes.axvline(limit, ymax=top, color=INK, linewidth=1.2, linestyle=":", label="limit")
        axes.set_xlabel("versions between oldest token and step")
        axes.set_ylabel("trajectories")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        room = 1.75 if dropped else 1.4  # for the legend
        axes.set_ylim(0, room * max(max(seen.values(), default=0) for seen in counts.values()))
        axes.legend(frameon=False, fontsize=12, loc="upper left", ncol=1 if dropped else 2, labelcolor=INK)
        plain(axes)


def _mean_length(ended: endings.Ended) -> str:
    """To train on, where that is on record: what was too old was longer, as a rule."""
    if ended.trainable is not None:
        return f"mean {ended.trainable.mean:.0f} tokens"
    return f"mean {ended.generated.mean:.0f} tokens written" if ended.generated is not None else "length unknown"


def _draw_ages_by_step(axes: Any, run: ReportRun) -> None:
    steps, limit = _steps_with(run, "staleness_mean", "staleness_max"), run.config.learner.max_staleness
    if not steps:
        say_missing(axes, "By step", "no step in metrics.jsonl")
        return
    say_title(axes, "Of the trained, by step")
    numbers = [line["step"] for line in steps]
    axes.plot(numbers, [line["staleness_max"] for line in steps], color=ORANGE, linewidth=1.4, label="largest")
    axes.plot(numbers, [line["staleness_mean"] for line in steps], color=BLUE, linewidth=2.2, label="mean")
    axes.axhline(limit, color=INK, linewidth=1.2, linestyle=":", label=f"limit {limit}")
    axes.set_ylim(0, 1.5 * max(limit, 1, *(line["staleness_max"] for line in steps)))
    axes.set_xlabel("learner step")
    axes.set_ylabel("versions")
    axes.legend(frameon=False, fontsize=12, loc="upper left", ncol=2, labelcolor=INK)
    _over_steps(axes)


def draw_latency(figure: Figure, run: ReportRun) -> None:
    """Seconds from admission to verdict and from there to a checkpoint that covers it; beneath: the learner's steps."""
    above, below = _two_rows(figure, right=0.91)
    _draw_stages(above, run)
    steps = _steps_with(run, "step_s", "idle_ratio")
    if not steps:
        say_missing(below, "Learner", "no step in metrics.jsonl")
        return
    seconds = np.array([line["step_s"] for line in steps])
    idle = np.array([line["idle_ratio"] for line in steps])
    say_title(below, f"Learner: {np.median(seconds):.2g} s a step, {percent(float(idle.mean()))} of its time idle")
    numbers = [line["step"] for line in steps]
    below.plot(numbers, seconds, color=GREEN, linewidth=1.8, label="step")
    below.set_ylim(0, 1.6 * float(np.quantile(seconds, 0.99)) or 1)
    below.set_ylabel("seconds")
    below.set_xlabel("learner step")
    _over_steps(below)
    other = below.twinx()
    other.plot(numbers, idle, color=PURPLE, linewidth=1.3, label="idle share")
    other.set_ylim(0, 1)
    other.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    other.tick_params(labelsize=12.5, colors=PURPLE, length=0)
    for side in other.spines.values():
        side.set_visible(False)
    lines = [*below.get_lines(), *other.get_lines()]
    below.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=12, ncol=2, labelcolor=INK)


def _draw_stages(axes: Any, run: ReportRun) -> None:
    curves = {stage: series.stage_latencies(run.lines, stage) for stage in series.STAGES}
    if not all(curves.values()):
        say_missing(axes, "Stage latencies", "the books have no times" if run.lines else _NEITHER)
        return
    highest = []
    for colour, (stage, curve) in zip((BLUE, ORANGE), curves.items(), strict=True):
        tokens = [point.tokens for point in curve]
        medians, highs = [point.median_s for point in curve], [point.p95_s for point in curve]
        axes.plot(tokens, medians, color=colour, linewidth=2.2, marker="o", markersize=4, label=stage)
        axes.plot(tokens, highs, color=colour, linewidth=1.2, linestyle="--", label="95th percentile")
        highest += highs
    judged, covered = (np.median([point.median_s for point in curve]) for curve in curves.values())
    say_title(axes, f"Median: {judged:.2g} s to the verdict, {covered:.2g} s more to a checkpoint")
    # Starting takes longer than all that follows; room for the legend above.
    axes.set_ylim(0, 1.7 * float(np.quantile(highest, 0.9)) or 1)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=12, ncol=2, loc="upper right", labelcolor=INK)
    _over_tokens(axes, run)


def draw_loss(axes: Any, run: ReportRun) -> None:
    """Divergence of student and teacher on what was trained on, and the student's entropy there, by step."""
    steps = _steps_with(run, "kl", "entropy")
    if not steps:
        say_missing(axes, "Divergence in training", "no step in metrics.jsonl")
        return
    numbers = [line["step"] for line in steps]
    kl, entropy = [line["kl"] for line in steps], [line["entropy"] for line in steps]
    tenth = max(1, len(kl) // 10)
    say_title(axes, f"Divergence in training: {np.mean(kl[:tenth]):.2g} → {np.mean(kl[-tenth:]):.2g} nats a token")
    axes.plot(numbers, kl, color=BLUE, linewidth=2, label="reverse KL to the teacher")
    axes.plot(numbers, entropy, color=ORANGE, linewidth=1.4, label="the student's entropy")
    axes.set_ylim(0, 1.25 * max(*kl, *entropy) or 1)
    axes.set_xlabel("learner step")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False, fontsize=12, labelcolor=INK)
    _over_steps(axes)


# Figure in metrics.jsonl → what is drawn of it (1: what it lacks of 1), its name, its colour. So drawn, all rise.
_GUARDS = {
    "repetition": (0, "repetition", VERMILLION),
    "truncation_rate": (0, "ended at the limit", ORANGE),
    "topk_overlap": (1, "top K replaced", GREEN),
    "support_mass": (1, "off support, student", BLUE),
    "support_mass_teacher": (1, "off support, teacher", SKY),
}


def draw_drift(figure: Figure, run: ReportRun) -> None:
    """The drift guards step by step, and beneath where the policy fired, in both arms."""
    above, below = _two_rows(figure, right=0.68)
    steps = _steps_with(run, *_GUARDS)
    if steps:
        numbers = [line["step"] for line in steps]
        for name, (whole, label, colour) in _GUARDS.items():
            values = [abs(whole - line[name]) for line in steps]
            above.plot(numbers, values, color=colour, linewidth=1.8, label=label)
        tenth = max(1, len(steps) // 10)
        first, last = (np.mean([line["repetition"] for line in part]) for part in (steps[:tenth], steps[-tenth:]))
        say_title(above, f"Drift: repetition {first:.2f} → {last:.2f}")
        _as_shares(above)
        above.set_xlabel("learner step")
        _over_steps(above)
    else:
        say_missing(above, "Drift", "no step in metrics.jsonl with drift guards")
    _draw_cut_rates(below, run)


def _draw_cut_rates(axes: Any, run: ReportRun) -> None:
    curves = {arm: series.fired_curve(run.lines, bins=8, arm=arm) for arm in ARMS}
    if not any(curves.values()):
        say_missing(axes, "Cut rate by arm", "no rollout that could have been cut")
        return
    names = {
        "treated": (f"treated: {fired_word(run.config).lower()}", VERMILLION),
        "control": ("control: would be", BLUE),
    }
    for arm, curve in curves.items():
        label, colour = names[arm]
        tokens = [point.tokens for point in curve]
        low, high = [point.low for point in curve], [point.high for point in curve]
        axes.fill_between(tokens, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(tokens, [point.share for point in curve], color=colour, linewidth=2.2, marker="o", label=label)
    say_title(axes, "Where the policy fired, by arm, with 95 % intervals")
    _as_shares(axes)
    _over_tokens(axes, run)


def _as_shares(axes: Any) -> None:
    axes.set_ylim(0, min(1.02, 1.1 * axes.dataLim.y1) or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("share")
    axes.legend(frameon=False, fontsize=12, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)


# --- common to them ------------------------------------------------------------------------------------------------


def _steps_with(run: ReportRun, *names: str) -> list[Object]:
    """Lines of metrics.jsonl that have these figures."""
    return [line for line in run.steps if all(isinstance(line.get(name), (int, float)) for name in names)]


def _two_rows(figure: Figure, right: float = 0.97) -> Sequence[Any]:
    grid = figure.add_gridspec(2, 1, left=0.11, right=right, top=0.91, bottom=0.11, hspace=0.55)
    return [figure.add_subplot(grid[0]), figure.add_subplot(grid[1])]


def _two_columns(figure: Figure) -> Sequence[Any]:
    grid = figure.add_gridspec(1, 2, left=0.11, right=0.97, top=0.88, bottom=0.16, wspace=0.3)
    return [figure.add_subplot(grid[0]), figure.add_subplot(grid[1])]


def _over_tokens(axes: Any, run: ReportRun) -> None:
    """Tokens generated below, from the run's first to its last."""
    axes.set_xlim(0, max(run.generated, 10))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("tokens generated so far")
    plain(axes)


def _over_steps(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    plain(axes)
