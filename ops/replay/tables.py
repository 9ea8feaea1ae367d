"""The result of a replay as text: a description of the record, a table, the same as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Termination
from ops.replay.record import Recording
from ops.replay.results import HitShare, Outcome
from ops.replay.verdicts import Judgement, reproduced
from ops.stats.intervals import FEW_PROMPTS
from ops.words import policy_text

_NONE = "–"


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table. `changes`: key and value as they are shown; `recorded`: by the numbers of the record."""

    name: str
    changes: tuple[tuple[str, str], ...]
    termination: Termination
    recorded: bool = False


# --- what was replayed ------------------------------------------------------------------------------------------------


def about(record: Recording, recorded: Sequence[Judgement], computed: Sequence[Judgement], missing: str) -> str:
    """What the figures stand on: which rollouts, how well the record is met, what could not be had (`missing`).

    `recorded`, `computed`: verdicts by the recorded settings, with numbers on record and computed ones (or none).
    """
    rollouts = record.rollouts
    parts = [
        ("recorded", policy_text(record.config, (one.threshold for one in rollouts))),
        ("counted", _counted(record)),
    ]
    waiting = Counter(one.arm for one in rollouts if one.free and not one.counts)
    if waiting:
        parts.append(("besides", f"{_arms(waiting)}: not counted, but in the calibration"))
    if not record.whole:
        stopped = sum(one.stopped for one in rollouts if not one.free)
        spared = sum(not one.free for one in rollouts) - stopped
        parts.append(
            (
                "left out",
                f"{stopped:,} treated that were stopped: how they would have continued is unknown; {spared:,} treated "
                f"that were not: they alone are a biased sample",
            )
        )
    if record.unusable:
        parts.append(("left out", f"{record.unusable:,} without a trace or a time on record"))
    met = reproduced(record, recorded)
    other = "" if met == len(rollouts) else ": the record was not made by this code and config"
    parts.append(("intervals", _intervals(record)))
    parts.append(
        (
            "check",
            f"{met:,} of {len(rollouts):,} recorded verdicts come out the same under the recorded settings and "
            f"numbers{other}",
        )
    )
    if (drift := drift_of(record, computed)) is not None:
        parts.append(
            (
                "numbers",
                f"below the first row: computed again from the replayed rollouts; under the recorded settings "
                f"{100 * drift:.1f} % (median) off those on record",
            )
        )
    if missing:
        parts.append(("answers", missing))
    return "\n".join(f"{name:9} {text}" for name, text in parts)


def _intervals(record: Recording) -> str:
    """How they are made."""
    count, prompts = len(record.counted), len({record.rollouts[place].problem for place in record.counted})
    text = "95 %; savings: bootstrap by prompt, shares: Wilson; each rollout has its own prompt"
    if prompts < count:
        text = f"95 %, by a bootstrap by prompt ({count:,} rollouts of {prompts:,} prompts)"
    few = f"; with {prompts} prompts they are too narrow: conclude nothing from them"
    return text + (few if prompts < FEW_PROMPTS else "")


def _counted(record: Recording) -> str:
    counted = [record.rollouts[place] for place in record.counted]
    text = _arms(Counter(one.arm for one in counted))
    right = sum(one.correct is True for one in counted)
    wrong = sum(one.correct is False for one in counted)
    return text + (f"; {right:,} right, {wrong:,} wrong" if right or wrong else "")


def _arms(counts: Counter[str]) -> str:
    return " and ".join(f"{count:,} {arm}" for arm, count in sorted(counts.items()))


def drift_of(record: Recording, verdicts: Sequence[Judgement]) -> float | None:
    """Median of |computed / recorded - 1| over rollouts that have both numbers; None without any."""
    both = [
        (verdict.number, one.threshold)
        for verdict, one in zip(verdicts, record.rollouts, strict=False)
        if verdict.number is not None and one.threshold
    ]
    return float(np.median([abs(new / old - 1) for new, old in both])) if both else None


# --- the table --------------------------------------------------------------------------------------------------------


def table(settings: Sequence[Setting], found: Sequence[Outcome]) -> list[list[str]]:
    """A heading, then a row for each setting."""
    names = ["setting", "active", "cut", "tokens", "saved", "kept", "signal"]
    names += ["right", "cut early", "cut late", "wrong", "wrong: cut"]
    return [names, *(_row(one, outcome) for one, outcome in zip(settings, found, strict=True))]


def _row(setting: Setting, outcome: Outcome) -> list[str]:
    cut = outcome.cut.value
    return [
        setting.name,
        f"{outcome.active:,}",
        _NONE if cut is None else f"{100 * cut:.0f} %",
        _tokens(outcome.generated),
        _NONE if outcome.saving is None else _percent(outcome.saving, outcome.saving_interval),
        _tokens(outcome.kept),
        _NONE if outcome.signal is None else _percent(outcome.signal, outcome.signal_interval),
        _NONE if outcome.early is None else f"{outcome.early.count:,}",
        _share(outcome.early),
        _share(outcome.late),
        f"{outcome.wrong.count:,}",
        _share(outcome.wrong),
    ]


def _tokens(mean: float | None) -> str:
    return _NONE if mean is None else f"{mean:.1f}"


def _share(share: HitShare | None) -> str:
    if share is None or share.value is None:
        return _NONE
    return _percent(share.value, share.interval)


def _percent(value: float, interval: tuple[float, float] | None) -> str:
    ends = "" if interval is None else f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    return f"{100 * value:.0f} %{ends}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """In columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def unequal(found: Sequence[Outcome]) -> list[str]:
    """A sentence where rows count different rollouts; nothing where all count the same number."""
    counts = sorted({outcome.active for outcome in found})
    if len(counts) == 1:
        return []
    counted = f"{counts[0]:,} to {counts[-1]:,} of {found[0].rollouts:,}"
    return [
        f"Rows count different rollouts, {counted} (active): each counts those that its setting could have cut. A "
        f"policy with a warm-up or a calibration cuts nothing before these are over, `fixed` from the first rollout "
        f"on, and a run's rollouts change as it learns. Compare rows of the same number."
    ]


READING = (
    "active: rollouts that the setting could have cut; all figures are of these. tokens: mean up to the trigger (what "
    "is written until the stop arrives comes on top). saved: compared with not cutting, bootstrap clustered by prompt. "
    "kept: mean tokens to train on. signal: mean divergence after the triggers, relative to that of rollouts of about "
    "the same version that were uncut there, from the same token on; 100 %: as alive as theirs, near 0: dead. right: "
    "rollouts with a right answer; cut early: those whose kept part the task's verifier does not call right (false "
    "stops); cut late: those that were cut and whose kept part is right. In brackets 95 % intervals. A replay does not "
    "show what a student trained with these settings would have written."
)


def markdown(head: str, rows: Sequence[Sequence[str]], notes: Sequence[str], picture: str) -> str:
    """The whole result as Markdown; `notes` stand below the table."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    rule = "| --- |" + " ---: |" * (len(rows[0]) - 1)
    return "\n".join(
        [
            "# Replay",
            "",
            "```",
            head,
            "```",
            "",
            lines[0],
            rule,
            *lines[1:],
            *(f"\n{note}" for note in notes),
            "",
            READING,
            "",
            f"![Trade-off]({picture})",
            "",
        ]
    )


# --- CSV --------------------------------------------------------------------------------------------------------------


def as_csv(settings: Sequence[Setting], found: Sequence[Outcome]) -> str:
    """A line for each setting, every figure unrounded; empty where there is none."""
    keys = list(dict.fromkeys(key for one in settings for key, _ in one.changes))
    text = io.StringIO()
    lines = [
        {"setting": one.name, **{key: _value(one.termination, key) for key in keys}, **_figures(one, outcome)}
        for one, outcome in zip(settings, found, strict=True)
    ]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _value(settings: Termination, key: str) -> object:
    name, _, part = key.partition(".")
    value = getattr(settings, name)
    return value.get(part, "") if part and isinstance(value, dict) else value


def _figures(setting: Setting, outcome: Outcome) -> dict[str, object]:
    low, high = outcome.saving_interval or (None, None)
    signal_low, signal_high = outcome.signal_interval or (None, None)
    return {
        "numbers": "recorded" if setting.recorded else "computed",
        "number_median": outcome.number,
        "rollouts": outcome.rollouts,
        "active": outcome.active,
        **_columns("cut", outcome.cut),
        "tokens_mean": outcome.generated,
        "tokens_mean_uncut": outcome.whole,
        "saving": outcome.saving,
        "saving_low": low,
        "saving_high": high,
        "kept_mean": outcome.kept,
        "signal": outcome.signal,
        "signal_low": signal_low,
        "signal_high": signal_high,
        **_columns("right_cut_before_answer", outcome.early),
        **_columns("right_stopped_before_answer", outcome.unwritten),
        **_columns("right_cut_behind_answer", outcome.late),
        **_columns("wrong_cut", outcome.wrong),
    }


def _columns(name: str, share: HitShare | None) -> dict[str, object]:
    low, high = (share.interval if share is not None else None) or (None, None)
    known = share is not None and share.count > 0
    return {
        name: share.hits if share is not None and known else None,
        f"{name}_of": share.count if share is not None and known else None,
        f"{name}_low": low,
        f"{name}_high": high,
    }
