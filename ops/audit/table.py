"""What an audit found, as a table, in words and as files; no drawing."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from ops.audit.chances import SOURCES, Audited, Chance, CutClass
from ops.stats.intervals import FEW_PROMPTS

"""Below so many prompts an interval by bootstrap is too narrow, which is noted."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """An audit: the run, the settings, the results. `fired`: recorded cuts, of which `cuts` were audited.

    `applied`: stop, mask or shadow. `versions`: first and last policy version that began a cut rollout.
    """

    run: str
    policy: str
    applied: str
    student: str
    teacher: str
    samples: int
    seed: int
    temperature: float
    top_p: float
    max_completion_length: int
    fired: int
    versions: tuple[int, int]
    cuts: Sequence[Audited]
    rows: Sequence[CutClass]

    @property
    def label(self) -> str:
        return self.policy if self.applied == "stop" else f"{self.policy} ({self.applied})"


_HEADS = {
    "keep": "kept",
    "keep_teacher": "kept, teacher",
    "trigger": "trigger",
    "whole": "whole",
    "uncut_keep": "uncut, kept",
    "uncut_trigger": "uncut, trigger",
}


def _cells(audit: AuditResult) -> list[list[str]]:
    """The head and a line for each class: P(correct) in percent, and its interval."""
    head = ["policy", "cuts that are", "n", *(_HEADS[source] for source in SOURCES)]
    return [head] + [
        [audit.label, row.kind, str(row.cuts), *(_percent(row.chances[source]) for source in SOURCES)]
        for row in audit.rows
    ]


def _percent(found: Chance | None) -> str:
    return "-" if found is None else f"{100 * found.mean:.0f} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def text_of(audit: AuditResult) -> str:
    """The audit as it is printed."""
    cells = _cells(audit)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [fill(line, 118, subsequent_indent="  ") for line in (*_legend(audit), *sentences(audit))]
    return "\n".join(["P(correct) in %, with 95 % intervals", *lines, "", *notes])


def markdown_of(audit: AuditResult) -> str:
    """The audit as a page; tables of several runs can be put together, their heads are the same."""
    head, *lines = _cells(audit)
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(
        [
            f"# Recoverability of the cuts of {audit.run}",
            "",
            "P(correct) in %, with 95 % intervals.",
            "",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            *(f"- {line}" for line in _legend(audit)),
            "",
            *sentences(audit),
            "",
        ]
    )


def _legend(audit: AuditResult) -> list[str]:
    everything = audit.rows[0].chances
    counts = {source: found.rollouts if found else 0 for source, found in everything.items()}
    meanings = [
        f"{_HEADS[source]}: {meaning}" + ("" if counts[source] == len(audit.cuts) else f" ({counts[source]} of them)")
        for source, meaning in SOURCES.items()
    ]
    made = (
        f"{audit.samples} continuations each, temperature {audit.temperature:g}, top-p {audit.top_p:g}, at most "
        f"{audit.max_completion_length} tokens in all, seed {audit.seed}"
    )
    first, last = audit.versions
    pairs = [(one.record, one.uncut) for one in audit.cuts if one.uncut is not None]
    shared = sum(cut.problem == uncut.problem for cut, uncut in pairs)
    return [
        *meanings,
        f"uncut rollouts: {shared} of {len(pairs)} have the cut one's prompt; a difference may come from the prompts",
        made,
        f"student: {audit.student}; the cut rollouts were begun by versions {first} to {last}; teacher: "
        f"{audit.teacher}",
    ]


def sentences(audit: AuditResult) -> list[str]:
    """The findings in plain words, no more than the intervals allow."""
    row = audit.rows[0]
    looked = f"{row.cuts} of {audit.fired} cuts" if row.cuts < audit.fired else f"all {row.cuts} cuts on record"
    kinds = ", ".join(f"{one.cuts} {one.kind}" for one in audit.rows[1:])
    found = [
        f"Audited {looked}: {kinds}.",
        f"Cuts were recoverable by this student in {_wide(row.recoverable)}: for these at least one of "
        f"{audit.samples} continuations of the kept prefix was right.",
        f"From the kept prefix the student reached the right answer in {_wide(row.chances['keep'])} of its "
        f"continuations, the teacher in {_wide(row.chances['keep_teacher'])}; from the trigger, as if it had not been "
        f"cut, the student in {_wide(row.chances['trigger'])}.",
        _against("At the kept length", row.kept_against_uncut),
        _against("At the trigger length", row.trigger_against_uncut),
    ]
    counted = (row.chances["keep"], row.trigger_against_uncut)
    prompts = min((one.prompts for one in counted if one is not None), default=0)
    if prompts < FEW_PROMPTS:
        found.append(f"Only {prompts} prompts: their intervals are too narrow; conclude nothing from them.")
    return found


def _wide(found: Chance | None) -> str:
    if found is None:
        return "an unknown share"
    return f"{100 * found.mean:.0f} % (95 % interval {100 * found.low:.0f} to {100 * found.high:.0f} %)"


def _against(where: str, found: Chance | None) -> str:
    if found is None:
        return f"{where} no uncut rollout was left to compare with: these chances cannot be compared."
    points = f"{100 * found.mean:+.0f} points (95 % interval {100 * found.low:+.0f} to {100 * found.high:+.0f})"
    word = "no clear difference" if found.low <= 0 <= found.high else "better" if found.low > 0 else "worse"
    return f"{where}, cut against uncut rollouts: {points} over {found.rollouts} pairs, {word}."


# --- files ------------------------------------------------------------------------------------------------------------


_CUT = ("rid", "arm", "problem", "version", "class", "keep", "trigger", "written", "answer", "samples")
_ABOUT = ("run", "policy", "applied", *_CUT)
_UNCUT = ("uncut_rid", "uncut_problem", "uncut_version")


def csv_of(audit: AuditResult) -> str:
    """A row a cut. `correct_…`: shares of right continuations are from 0 to 1, empty if unavailable."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_ABOUT, *(f"correct_{source}" for source in SOURCES), *_UNCUT])
    for one in audit.cuts:
        cut, uncut = one.record, one.uncut
        row = [audit.run, audit.policy, audit.applied, cut.rid, cut.arm, cut.problem, cut.version, one.kind]
        row += [cut.keep, cut.trigger, cut.written, _shown(one.answer), audit.samples]
        row += [_shown(one.right[source]) for source in SOURCES]
        row += [uncut.rid, uncut.problem, uncut.version] if uncut else [""] * len(_UNCUT)
        writer.writerow(row)
    return file.getvalue()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def tree_of(audit: AuditResult) -> dict[str, Any]:
    """The audit as it stands in audit.json; chances as objects, null where there are none."""
    names = ("run", "policy", "applied", "student", "teacher", "samples", "seed", "temperature", "top_p")
    tree: dict[str, Any] = {name: getattr(audit, name) for name in names}
    tree |= {"max_completion_length": audit.max_completion_length, "versions": list(audit.versions)}
    tree |= {"cuts_on_record": audit.fired, "cuts": len(audit.cuts), "classes": {}}
    for row in audit.rows:
        tree["classes"][row.kind] = {
            "cuts": row.cuts,
            "correct": {source: _object(found) for source, found in row.chances.items()},
            "recoverable": _object(row.recoverable),
            "keep_minus_uncut": _object(row.kept_against_uncut),
            "trigger_minus_uncut": _object(row.trigger_against_uncut),
        }
    return tree


def _object(found: Chance | None) -> dict[str, float | int] | None:
    if found is None:
        return None
    numbers = {name: round(getattr(found, name), 6) for name in ("mean", "low", "high")}
    return {**numbers, "rollouts": found.rollouts, "prompts": found.prompts}
