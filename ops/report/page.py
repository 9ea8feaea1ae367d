"""report.html: a run in one file that a browser opens offline: figures, plots, the text of every rollout.

The data of the rollouts' table is in the page as JSON, which ops/report/html/report.js reads:

    columns   name, title, meaning and kind (text | count | number) of the fields of a row
    rows      a list of values for each rollout, in the order of the books
    pieces    [token id, text] of every token that occurs
    readings  rollout id → prompt, keep, trigger; pieces: indices into `pieces`, uint16 (uint32 if `wide`), and
              divergence in nats, float32, NaN if not scored, both little-endian in base64
    scale     log10 of the divergences in nats with the palest and the strongest colour

Rollouts may contain any text: it is embedded as JSON without a single "<", and shown as text, never as HTML. The
page's content security policy allows only its own script, by its hash, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.config import Config
from common.files import write_atomically
from common.runfiles.names import REPORT_PAGE
from common.runfiles.records import BookLine, Saving
from ops.plots import named
from ops.reading.rollouts import Reading, Words, readings_from_folder
from ops.report import data, plots
from ops.report.panels import headline
from ops.report.run import ReportRun
from ops.stats import endings, rewards
from ops.stats.saving import ARMS, arm_totals
from ops.stats.teachers import by_teacher
from ops.words import policy_text, teachers_text

FILES = Path(__file__).parent / "html"
NEWEST, SAMPLED = 1000, 1000
"""Rollouts in the page: the newest, and of the older ones the same number of each arm, reason and ending."""
MOST_TOKENS = 500_000
"""Limit of tokens in the page; a rollout that would exceed it is left out."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the rollouts' table. `value`: from a rollout's position in the books and its line; None: unknown."""

    name: str
    title: str
    kind: str
    meaning: str
    value: Callable[[int, BookLine], Any]


def _field(name: str) -> Callable[[int, BookLine], Any]:
    return lambda _, line: getattr(line, name)


def _seconds(begin: str, end: str) -> Callable[[int, BookLine], Any]:
    def between(_: int, line: BookLine) -> float | None:
        times = getattr(line, begin), getattr(line, end)
        return None if times[0] is None or times[1] is None else round(times[1] - times[0], 3)

    return between


def _ending(_: int, line: BookLine) -> str:
    return line.ending + (f": {line.reason}" if line.reason else "")


COLUMNS = (
    Column("place", "#", "count", "order in which rollouts were booked", lambda place, _: place + 1),
    Column("rid", "rollout", "text", "id of the rollout", _field("rid")),
    Column("problem", "problem", "count", "number of the training problem", _field("problem")),
    Column("arm", "arm", "text", "treated rollouts may be cut, control rollouts never are", _field("arm")),
    Column("finish", "reason", "text", "why it ended", _field("finish_reason")),
    Column("ending", "ending", "text", "trained, dropped (and why) or dead", _ending),
    Column("correct", "right", "text", "whether its answer is right", _field("correct")),
    Column("generated", "generated", "count", "tokens generated", _field("tokens_generated")),
    Column("kept", "kept", "count", "tokens before the cut", _field("tokens_kept")),
    Column("detection", "detection", "count", "tokens from the cut to the trigger", _field("tokens_detection")),
    Column("overshoot", "overshoot", "count", "tokens after the trigger", _field("tokens_overshoot")),
    Column("window", "lowest window", "number", "lowest window mean of divergence, nats", _field("min_window")),
    Column(
        "threshold",
        "threshold",
        "number",
        "the threshold of its verdict, in nats for policies with windows",
        _field("threshold"),
    ),
    Column("version", "version", "count", "policy version that wrote its last token", _field("policy_version_last")),
    Column("stale", "stale", "count", "its age in policy versions when it was trained on", _field("staleness")),
    Column(
        "wait",
        "to verdict, s",
        "number",
        "seconds from admission to verdict",
        _seconds("admitted_unix_s", "verdict_unix_s"),
    ),
)


_SHOWN_OF_COLUMN = ("name", "title", "meaning", "kind")


def write_page(run: ReportRun, figures: dict[str, Figure]) -> Path:
    """Write `report.html` with the figures of `plots.draw_all`. Raises ConfigError."""
    text = page(run, {name: plots.svg(figure, name) for name, figure in figures.items()})
    target = run.folder.path / REPORT_PAGE
    # JSON allows a lone surrogate in a string, UTF-8 does not.
    with named(target):
        write_atomically(target, lambda path: _write(path, text.encode("utf-8", "replace")))
    return target


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def page(run: ReportRun, drawn: dict[str, str]) -> str:
    """The text of the page; `drawn`: <svg> elements by the plot's name. Raises ConfigError."""
    script = (FILES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    chosen = choose(run.lines)
    filled = {
        "css": (FILES / "report.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "name": escape(run.config.name),
        "headline": escape(headline(run)),
        "figures": f"<div>{_facts(run)}</div><div>{_arms(run)}{_teachers(run)}{_endings(run)}{_evaluations(run)}</div>",
        "plots": "\n".join(_figure(name, drawn[name]) for name in plots.PLOTS),
        "shown": escape(_shown(run, len(chosen))),
        "data": _inert(table_data(run, chosen)),
        "config": escape(run.config.to_yaml()),
        "footer": escape(f"Made by `katana report` from {run.folder.path.name}/. {_newest_time(run)}".strip()),
    }
    template = (FILES / "report.html").read_text(encoding="utf-8")
    # In one pass: the inserted text may contain braces.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _inert(value: Any) -> str:
    """JSON that cannot close the element around it or open another."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _figure(name: str, drawn: str) -> str:
    plot = plots.PLOTS[name]
    caption, wide = escape(plot.caption), " class=wide" if plot.width_inches > plots.NARROW else ""
    named = drawn.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f'<figure id="plot-{name}"{wide}>{named}<figcaption>{caption}</figcaption></figure>'


# --- head figures --------------------------------------------------------------------------------------------------


def _done_text(run: ReportRun) -> str:
    """Steps done of all steps; if tokens end the run, tokens of all tokens."""
    learner, done = run.config.learner, run.steps_done
    if learner.max_generated_tokens is None:
        return f"{done} of {learner.max_steps} steps of {learner.batch_size} rollouts"
    tokens = f"{run.generated:,} of {learner.max_generated_tokens:,} tokens generated"
    return f"{tokens}, in {done} steps of {learner.batch_size} rollouts"


def _facts(run: ReportRun) -> str:
    config = run.config
    rows = [
        ("run", f"{config.name}: {_done_text(run)}"),
        ("wall time", _wall_text(run)),
        ("models", f"{config.student.model} learns from {teachers_text(config)}"),
        ("task", f"{config.data.task}, at most {config.rollout.max_completion_length} tokens"),
        ("policy", policy_text(config, (line.threshold for line in run.lines))),
        ("length saving", _saving_text(run.saving)),
        ("finished", data.reasons_text(run.lines)),
        ("ledger", data.ledger_text(run.folder)),
        *(("rewards", rewards.words(one)) for one in [rewards.rewards_of(run.folder, run.lines)] if one is not None),
        *(("left out", endings.words(one)) for one in endings.left_out(endings.by_ending(run.lines))),
    ]
    body = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table><caption>The run</caption><tbody>{body}</tbody></table>"


def _saving_text(saving: Saving) -> str:
    if saving.ratio is None or saving.low is None or saving.high is None:
        return "unknown: it needs rollouts of both arms that the policy could have cut"
    return f"{saving.ratio:.1%} (95 % interval {saving.low:.1%} to {saving.high:.1%})"


def _wall_text(run: ReportRun) -> str:
    """The time that `katana run` measured, or on a cluster the time that the books cover."""
    if run.wall_s is not None:
        return _duration(run.wall_s)
    begun = [line.admitted_unix_s for line in run.lines if line.admitted_unix_s is not None]
    ended = [line.ended_unix_s for line in run.lines if line.ended_unix_s is not None]
    if not begun or not ended:
        return "unknown until the run ends"
    return f"{_duration(max(ended) - min(begun))} from the first to the last booked rollout"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _arms(run: ReportRun) -> str:
    names = {
        "rollouts": "rollouts",
        "tokens_generated": "generated",
        "tokens_kept": "kept",
        "tokens_trained": "trained on",
        "tokens_detection": "detection",
        "tokens_overshoot": "overshoot",
        "mean_generated": "mean length",
    }
    totals = {arm: arm_totals(run.lines, arm) for arm in ARMS}
    rows = [[arm, *(getattr(totals[arm], name) for name in names)] for arm in ARMS]
    counts = [sum(getattr(totals[arm], name) for arm in ARMS) for name in list(names)[:-1]]
    mean = counts[1] / counts[0] if counts[0] else None
    return _table("Tokens", ["", *names.values()], [*rows, ["both", *counts, mean]])


def _teachers(run: ReportRun) -> str:
    """Figures of each of several teachers."""
    heads = ["", "rollouts", "trained", "mean length", "right", "cut"]
    rows = [
        [name, one.rollouts, one.trained, one.mean_generated, one.accuracy, one.cut_rate]
        for name, one in by_teacher(run.lines).items()
    ]
    return _table("Teachers: rollouts, their mean length, shares right and cut", heads, rows) if rows else ""


def _endings(run: ReportRun) -> str:
    """Endings of the rollouts, and their lengths; a dash if a length is unknown."""
    heads = ["", "rollouts", "share", "at the limit", "to train on", "± sd", "written", "± sd"]
    rows = []
    for one in endings.by_ending(run.lines).values():
        known = [(None, None) if found is None else (found.mean, found.sd) for found in (one.trainable, one.generated)]
        share = one.rollouts / len(run.lines)
        rows.append([one.fate, one.rollouts, share, one.at_limit, *(number for pair in known for number in pair)])
    return _table("Endings, mean tokens", heads, rows) if rows else ""


def _evaluations(run: ReportRun) -> str:
    if not run.evaluations:
        return ""
    k = run.evaluations[0].scores.k
    found = [(one.step, one.scores) for one in run.evaluations]
    rows = [[f"step {step}", one.n, one.avg_at_k, one.pass_at_k, one.mean_length] for step, one in found]
    return _table("Evaluations", ["", "problems", f"avg@{k}", f"pass@{k}", "mean length"], rows)


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th scope=col class=number>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr><th scope=row>{escape(str(first))}</th>"
        + "".join(f"<td class=number>{escape(_number(value))}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _shown(run: ReportRun, count: int) -> str:
    total = len(run.lines)
    if count == total:
        return f"All {total:,} booked rollouts. Choose one to read it."
    return (
        f"{count:,} of {total:,} booked rollouts: the newest, and of the older ones the same number of each arm, "
        f"reason and ending. The others are in rollouts.jsonl and traces.jsonl. Choose one to read it."
    )


def _newest_time(run: ReportRun) -> str:
    """Time of the newest step, in UTC: it shows how fresh the page is."""
    return f"Newest step {np.datetime64(int(run.steps[-1].unix_s), 's')} UTC." if run.steps else ""


# --- the rollouts --------------------------------------------------------------------------------------------------


def choose(lines: Sequence[BookLine]) -> list[int]:
    """Positions in the books of the rollouts in the page, in order: NEWEST and SAMPLED, while they fit."""
    split = max(0, len(lines) - NEWEST)
    groups: dict[tuple[str, ...], list[int]] = {}
    for place in range(split):
        line = lines[place]
        groups.setdefault((line.arm, line.finish_reason, line.ending, line.reason), []).append(place)
    older: list[int] = []
    # The smallest group first: its unused share goes to the others.
    for left, group in zip(range(len(groups), 0, -1), sorted(groups.values(), key=len), strict=True):
        older += data.spread(group, (SAMPLED - len(older)) // left)
    tokens, chosen = 0, []
    for place in [*reversed(range(split, len(lines))), *older]:
        size = lines[place].tokens_generated
        if tokens + size <= MOST_TOKENS:
            tokens += size
            chosen.append(place)
    return sorted(chosen)


def table_data(run: ReportRun, chosen: Sequence[int]) -> dict[str, Any]:
    """The JSON for the page's script, see the top of this file. Raises ConfigError."""
    timed = any(line.admitted_unix_s is not None for line in run.lines)
    columns = [*(COLUMNS if timed else COLUMNS[:-1])]
    if run.config.teachers:
        columns.insert(3, Column("teacher", "teacher", "text", "the teacher that scored it", _field("teacher")))
    rids, folder = {run.lines[place].rid for place in chosen}, run.folder.path
    readings = list(readings_from_folder(folder, run.config, rids, words=_RememberedWords(run.config, folder)))
    pieces: dict[tuple[int, str], int] = {}
    for reading in readings:
        for token in reading.tokens:
            pieces.setdefault((token.id, token.text), len(pieces))
    wide = len(pieces) > 1 << 16
    return {
        "columns": [{name: getattr(column, name) for name in _SHOWN_OF_COLUMN} for column in columns],
        "rows": [[column.value(place, run.lines[place]) for column in columns] for place in chosen],
        "pieces": list(pieces),
        "wide": wide,
        "readings": {reading.rid: _packed(reading, pieces, "<u4" if wide else "<u2") for reading in readings},
        "scale": _scale(readings),
        "why_no_text": _why_no_text(run),
    }


def _why_no_text(run: ReportRun) -> str:
    if not run.config.feeder.record_traces:
        return "Its tokens were not recorded: feeder.record_traces is off."
    return "Its tokens were not recorded: it ended before its verdict."


def _packed(reading: Reading, pieces: dict[tuple[int, str], int], kind: str) -> dict[str, Any]:
    places = np.array([pieces[token.id, token.text] for token in reading.tokens], dtype=kind)
    nats = np.array([np.nan if token.divergence is None else token.divergence for token in reading.tokens], dtype="<f4")
    return {
        "prompt": reading.prompt,
        "keep": reading.keep,
        "trigger": reading.trigger,
        "pieces": base64.b64encode(places.tobytes()).decode(),
        "divergence": base64.b64encode(nats.tobytes()).decode(),
    }


def _scale(readings: Iterable[Reading]) -> list[float]:
    """log10 of the 2 % and 98 % quantiles of the divergences; without any token, of 0.001 and 1 nat."""
    nats = [token.divergence for reading in readings for token in reading.tokens if token.divergence is not None]
    if not nats:
        return [-3.0, 0.0]
    low, high = np.quantile(np.log10(np.maximum(nats, data.FLOOR_NATS)), [0.02, 0.98])
    return [round(float(low), 3), round(float(high), 3)]


class _RememberedWords(Words):
    """A cache: the rollouts of a run repeat the same tokens."""

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__(config, folder)
        self._remembered = lru_cache(maxsize=1 << 16)(super().decode)

    def decode(self, ids: Sequence[int]) -> str:
        return self._remembered(tuple(ids))
