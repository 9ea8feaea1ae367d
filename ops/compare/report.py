"""The report of a comparison, from its folder alone: compare.csv, compare.md, compare.png, compare.html.

Tables are made once, as text, for Markdown, the terminal and the page. The same folder gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from common.files import write_text
from ops.compare.data import FIGURES, Comparison, Figure, read_comparison, to_csv
from ops.compare.drift import GUARDS
from ops.compare.grid import source_of
from ops.compare.match_means import TOLERANCE
from ops.compare.plots import draw
from ops.plots import named, save_png
from ops.report import plots
from ops.report.page import FILES
from ops.stats import endings
from ops.stats.seeds import FEWEST_SEEDS, ROUNDING, VERDICTS, Interval, Paired, mean_interval, paired

NAMES = ("compare.md", "compare.html", "compare.png", "compare.csv")
_DOTS_PER_INCH = 100
_RESULT = ("avg_at_k", "pass_at_k", "tokens_generated", "tokens_trained", "steps", "wall_s")
_CUTTING = (
    "tokens_detection",
    "tokens_overshoot",
    "length",
    "length_treated",
    "length_control",
    "kept_treated",
    "length_saving",
)
_LEFT_OUT = (
    *(f"{fate}_share" for fate in endings.MEANINGS),
    "trainable_trained",
    "trainable_stale",
    "written_trained",
    "written_stale",
)
_PAIRED = ("avg_at_k", "pass_at_k", "tokens_generated")
_MATCHED_FIGURES = {"generated": "length_treated", "kept": "kept_treated"}
_PLOT_CAPTION = (
    "Left: the last evaluation of every seed (dots), mean and 95 % t interval. Right: avg@k of all evaluations over "
    "tokens generated; thin lines are seeds, thick ones their mean. Below, where a policy cut: the share of trained "
    "rollouts that it cut (line) or in the control arm would have cut (dots), and its threshold relative to its first, "
    "means over seeds."
)


@dataclass(frozen=True, slots=True)
class Table:
    """A part of the report: title, heads, rows of text, and notes below."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: frozenset[int] = frozenset({0})
    """Columns of words, aligned left; numbers are aligned right."""


def write_report(folder: Path) -> str:
    """Write the four files into the comparison's folder; returns the tables as text. Raises ConfigError."""
    comparison = read_comparison(folder)
    tables = all_tables(comparison)
    figure = draw(comparison)
    text = to_markdown(comparison.name, tables)
    save_png(figure, folder / "compare.png", _DOTS_PER_INCH)
    _write(folder / "compare.csv", to_csv(comparison))
    _write(folder / "compare.md", text + f"\n![{_PLOT_CAPTION}](compare.png)\n")
    _write(folder / "compare.html", to_html(comparison.name, tables, plots.svg(figure, "compare")))
    return text


def _write(path: Path, text: str) -> None:
    with named(path):
        write_text(path, text)


# --- tables --------------------------------------------------------------------------------------------------------


def all_tables(comparison: Comparison) -> list[Table]:
    """The sections of a comparison, in order."""
    tables = [_results(comparison), _cutting(comparison), _left_out(comparison), _drift(comparison)]
    if len(comparison.labels) > 1:
        tables += [_pairs(comparison, one) for one in _references(comparison)]
    matched = {cell.label for cell, _, _ in comparison.matches}
    tables += [_matches(comparison, label) for label in comparison.matched if label in matched]
    return tables


def _references(comparison: Comparison) -> list[str]:
    """What the others are compared with: rows that are made for it, or the first row."""
    there = [label for label in comparison.labels if comparison.of(label)]
    return [one for one in ("none", *comparison.matched) if one in there] or there[:1]


def _results(comparison: Comparison) -> Table:
    budget = comparison.grid.budget
    notes = [
        "Mean over seeds ± half of the 95 % t interval; without ± there is one seed. Accuracy is that of the last "
        "evaluation. Cells of one seed share their training and evaluation problems; seeds of task `dataset` share "
        "their benchmarks too, and then the intervals do not cover other problems.",
        "Wall-clock seconds are comparable only if cells ran one at a time (--jobs 1) on an otherwise idle machine; "
        "they include the wait for the evaluator at the end of a run.",
    ]
    if comparison.undone:
        names = ", ".join(f"{cell.name} ({comparison.states[cell]})" for cell in comparison.undone)
        notes.insert(0, f"NOT DONE, and left out of all tables: {names}.")
    if any(result.unfair for result in comparison.results.values()):
        names = ", ".join(cell.name for cell in sorted(comparison.results) if comparison.results[cell].unfair)
        notes.insert(0, f"WARNING: not trained on a fair sample: {names}. See what was left out, below.")
    title = f"Results: {len(comparison.results)} runs, budget {budget}"
    return _by_row(comparison, title, _RESULT, notes)


def _cutting(comparison: Comparison) -> Table:
    notes = [
        "Tokens of a run: detection from the cut to the trigger, overshoot after it. Mean tokens a rollout: length of "
        "all finished ones; treated and control of those that could have been cut; kept of these treated ones; "
        "saving = 1 - treated / control."
    ]
    return _by_row(comparison, "What was cut", _CUTTING, notes)


def _left_out(comparison: Comparison) -> Table:
    meanings = ", ".join(f"{name} ({meaning})" for name, meaning in endings.MEANINGS.items())
    notes = [
        f"Rollouts not trained on, as shares of these and the trained: {meanings}. Then mean tokens of trained and "
        f"stale ones: to train on (that the learner got, or would have got: the sample), and written (the cause of the "
        f"delay). Long rollouts are stale first: a row that loses many trains on shorter texts than it wrote, "
        f"and one whose policy shortens its rollouts loses less: at equal steps they differ by more than the policy."
    ]
    for cell in sorted(comparison.results):
        notes += [f"WARNING, {cell.name}: {endings.words(one)}." for one in comparison.results[cell].unfair]
    if len(notes) > 1:
        notes.append(
            f"A warning means: more than {endings.NEGLIGIBLE:.0%} stale, dead or lost, with mean lengths that a fair "
            f"sample has less than once in 100 times, or that are not recorded. A higher `learner.max_staleness`, "
            f"fewer rollouts at a time (`feeder.concurrency`) or more teachers make them fewer."
        )
    return _by_row(comparison, "What was left out of the training", _LEFT_OUT, notes)


def _drift(comparison: Comparison) -> Table:
    rows = []
    for label in comparison.labels:
        cells = []
        for guard in GUARDS:
            early, late = (comparison.values(label, f"{guard}_{when}") for when in ("early", "late"))
            cells.append(_change(early, late, FIGURES[f"{guard}_late"], len(comparison.of(label))))
        rows.append([label, *cells])
    notes = [
        "First third → last third of the learner's steps, means over seeds, and the change ± half of its 95 % t "
        "interval; for a policy with a threshold only steps in which it was active (in the first of them not yet for "
        "all rollouts). Threshold: the number it judged by, in its unit (for `random_matched` the scale). Cut rate: "
        "share of the trained rollouts that the policy cut, or in the control arm would have cut. Repetition: share "
        "of a text that deflate saves; truncation: share that ended at the length limit; entropy in nats."
    ]
    return Table("Drift", ["row", *(guard.replace("_", " ") for guard in GUARDS)], rows, notes)


def _change(early: Mapping[int, float], late: Mapping[int, float], figure: Figure, seeds: int) -> str:
    found = paired(late, early)
    if found is None:
        return "–"
    both = early.keys() & late.keys()
    first, last = (sum(values[seed] for seed in both) / len(both) for values in (early, late))
    change, spread = found.interval.mean, found.interval.half
    if abs(change) + (spread or 0.0) < ROUNDING * abs(last):
        change, spread = 0.0, None if spread is None else 0.0
    half = "" if spread is None else f" ± {figure.write(spread)}"
    fewer = "" if len(both) == seeds else f" ({len(both)} seeds)"
    return f"{figure.write(first)} → {figure.write(last)} ({figure.write(change, '+')}{half}){fewer}"


def _by_row(comparison: Comparison, title: str, figures: Sequence[str], notes: Sequence[str]) -> Table:
    rows = []
    for label in comparison.labels:
        done = len(comparison.of(label))
        intervals = [mean_interval(list(comparison.values(label, name).values())) for name in figures]
        cells = [_mean(one, name, done) for one, name in zip(intervals, figures, strict=True)]
        rows.append([label, str(done), *cells])
    return Table(title, ["row", "seeds", *(_head(comparison, name) for name in figures)], rows, notes)


def _head(comparison: Comparison, name: str) -> str:
    """With the number in place of k where it is the same in all runs."""
    tried = {result.k for result in comparison.results.values()} - {None}
    head = FIGURES[name].head
    return head.replace("@k", f"@{tried.pop()}") if len(tried) == 1 else head


def _mean(interval: Interval | None, name: str, seeds: int) -> str:
    if interval is None:
        return "–"
    figure = FIGURES[name]
    spread = "" if interval.half is None else f" ± {figure.write(interval.half)}"
    fewer = "" if interval.n == seeds else f" ({interval.n} seeds)"
    return f"{figure.write(interval.mean)}{spread}{figure.unit}{fewer}"


def _pairs(comparison: Comparison, reference: str) -> Table:
    rows = []
    for name in _PAIRED:
        theirs = comparison.values(reference, name)
        for label in comparison.labels:
            found = paired(comparison.values(label, name), theirs) if label != reference else None
            if found is not None:
                rows.append([_head(comparison, name), label, *_pair(found, FIGURES[name])])
    stated = sum(row[-1] in VERDICTS for row in rows)
    notes = [
        f"Row minus `{reference}`, seed by seed. The words follow the t interval: `no difference seen` if it contains "
        f"0, which does not mean that there is none; below {FEWEST_SEEDS} seeds there is no verdict. The bootstrap "
        f"resamples only seeds, because evaluations do not record single problems; with few seeds it is too "
        f"narrow (with 5 it covers about 83 % and not 95 %).",
    ]
    if stated:
        notes.append(
            f"Lines are not corrected for multiple comparisons: of {stated} without any difference about "
            f"{0.05 * stated:.2g} would be significant by chance."
        )
    if reference in comparison.matched:
        notes += _unmatched(comparison, reference)
    heads = ["figure", "row", "seeds", "difference", "95 % t interval", "bootstrap", "seeds + = −", "in words"]
    return Table(f"Against {reference}, paired by seed", heads, rows, notes, frozenset({0, 1, 7}))


def _unmatched(comparison: Comparison, label: str) -> list[str]:
    """A note on the seeds whose random_matched is not a matched control."""
    agree = {cell.seed: agreed for cell, _, agreed in comparison.matches if cell.label == label}
    apart = [str(seed) for seed in comparison.grid.seeds if agree.get(seed) is False]
    unknown = [str(result.cell.seed) for result in comparison.of(label) if agree.get(result.cell.seed) is None]
    notes = [f"NOT matched within 2 %: seed {', '.join(apart)}"] if apart else []
    notes += [f"match unknown: seed {', '.join(unknown)}"] if unknown else []
    return (
        [f"{'; '.join(notes)}. There `{label}` is not a matched control, and these seeds count above."] if notes else []
    )


def _pair(found: Paired, figure: Figure) -> list[str]:
    interval = found.interval
    return [
        str(interval.n),
        figure.write(interval.mean, "+"),
        _range(interval.low, interval.high, figure),
        _range(found.bootstrap_low, found.bootstrap_high, figure),
        f"{found.higher} {found.equal} {found.lower}",
        found.words,
    ]


def _range(low: float | None, high: float | None, figure: Figure) -> str:
    return "–" if low is None or high is None else f"{figure.write(low, '+')} to {figure.write(high, '+')}"


def _matches(comparison: Comparison, label: str) -> Table:
    words = {True: "within 2 %", False: "NOT within 2 %", None: "no means"}
    rows = [[str(cell.seed), words[agree], text] for cell, text, agree in comparison.matches if cell.label == label]
    notes = [
        f"Realised means of treated rollouts that could have been cut: `{source_of(label)}`, then `{label}` of the "
        f"same seed; overshoot included. Where they do not agree, `{label}` is not a matched control of that seed. "
        f"Compared above are means over seeds; the last line shows how well these agree.",
    ]
    apart = {name: _apart(comparison, label, figure) for name, figure in _MATCHED_FIGURES.items()}
    known = {name: one for name, one in apart.items() if one is not None}
    if len(rows) > 1 and len(known) == len(apart):
        agree = all(abs(one.mean) <= TOLERANCE for one in known.values())
        texts = [f"mean {name} {one.mean:+.1%} ± {one.half or 0:.1%}" for name, one in known.items()]
        rows.append(["all", words[agree], ", ".join(texts)])
    return Table(f"Was {label} matched?", ["seed", "agree", "realised means"], rows, notes, frozenset({0, 1, 2}))


def _apart(comparison: Comparison, label: str, figure: str) -> Interval | None:
    """Relative difference of a matched row from what it is matched to: mean over seeds, 95 % t interval."""
    wanted, made = (comparison.values(one, figure) for one in (source_of(label) or "", label))
    return mean_interval(
        [made[seed] / wanted[seed] - 1 for seed in sorted(wanted.keys() & made.keys()) if wanted[seed]]
    )


# --- as text -------------------------------------------------------------------------------------------------------


def to_markdown(name: str, tables: Sequence[Table]) -> str:
    """Tables with aligned columns, readable as text and as Markdown."""
    parts = [f"# {name}\n"]
    for table in tables:
        parts.append(f"## {table.title}\n")
        parts.append(_even(table) + "\n")
        parts += [f"{note}\n" for note in table.notes]
    return "\n".join(parts)


def _even(table: Table) -> str:
    columns = list(zip(table.heads, *table.rows, strict=True))
    widths = [max(3, *(len(text) for text in column)) for column in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if place in table.words else text.rjust(width)
            for place, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if place in table.words else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join([line(table.heads), line(rule), *(line(row) for row in table.rows)])


# --- as a page -----------------------------------------------------------------------------------------------------

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Katana · {name}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<header><h1>Katana · {name}</h1></header>
<main>
<h2>Plots</h2>
<figure class=wide>{drawn}<figcaption>{caption}</figcaption></figure>
{tables}
</main>
<footer><p>Made by <code>katana compare --report-only</code> from {name}/; every number is in compare.csv.</p></footer>
</body>
</html>
"""


_CODE = re.compile("`([^`]+)`")


def to_html(name: str, tables: Sequence[Table], drawn: str) -> str:
    """A page that a browser opens without a network; `drawn` is an <svg> element."""
    caption = escape(_PLOT_CAPTION)
    return _PAGE.format(
        name=escape(name),
        css=(FILES / "report.css").read_text(encoding="utf-8"),
        drawn=drawn.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1),
        caption=caption,
        tables="\n".join(_html(table) for table in tables),
    )


def _html(table: Table) -> str:
    def row(texts: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag}{'' if place in table.words else ' class=number'}>{escape(text)}</{tag}>"
            for place, text in enumerate(texts)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head, body = row(table.heads, "th"), "".join(row(texts, "td") for texts in table.rows)
    notes = "".join("<p class=facts>" + _CODE.sub(r"<code>\1</code>", escape(note)) + "</p>" for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2><div class=tables><div><table><thead>{head}</thead>"
        f"<tbody>{body}</tbody></table></div></div>{notes}"
    )
