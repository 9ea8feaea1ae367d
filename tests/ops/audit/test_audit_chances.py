"""Chances, their intervals and their words, by hand."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_audit_cuts import record, uncut

from ops.audit.chances import ALL, SOURCES, Audited, chance, rows_of
from ops.audit.cuts import AFTER, BEFORE, LOOP
from ops.audit.plot import draw
from ops.audit.table import AuditResult, csv_of, markdown_of, sentences, text_of, tree_of

SHARES: dict[str, float | None] = {
    "keep": 0.5,
    "keep_teacher": 1.0,
    "trigger": 0.25,
    "whole": None,
    "uncut_keep": 0.75,
    "uncut_trigger": 0.75,
}


def audited(number: int, kind: str = BEFORE, *, alone: bool = False, **shares: float | None) -> Audited:
    other = None if alone else uncut(1000 + number)
    lacking = {"uncut_keep": None, "uncut_trigger": None} if alone else {}
    return Audited(record(number), kind, None, other, {**SHARES, **lacking, **shares})


def an_audit(cuts: Sequence[Audited], **changes: Any) -> AuditResult:
    values: dict[str, Any] = {
        "run": "first",
        "policy": "kat",
        "applied": "stop",
        "student": "model/",
        "teacher": "teacher",
        "samples": 4,
        "seed": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_completion_length": 192,
        "fired": 50,
        "versions": (3, 9),
        "cuts": cuts,
        "rows": rows_of(cuts, 0),
    }
    return AuditResult(**values | changes)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_mean_is_over_cuts_and_prompts_are_counted() -> None:
    found = chance([1.0, 0.5, 0.0, 0.0], [1, 1, 2, 3])
    assert found is not None
    assert (found.mean, found.rollouts, found.prompts) == (0.375, 4, 3)
    assert chance([], []) is None


def test_the_interval_of_independent_values_is_the_usual_one() -> None:
    values = (np.arange(400) % 4 == 0).astype(float).tolist()  # 100 of 400
    found = chance(values, list(range(400)))
    assert found is not None
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.low == pytest.approx(0.25 - half, abs=0.006)
    assert found.high == pytest.approx(0.25 + half, abs=0.006)


def test_rollouts_of_one_prompt_make_the_interval_no_narrower() -> None:
    values = [1.0, 0.0, 1.0, 0.0] * 10
    alone = chance(values, list(range(40)))
    four_each = chance([value for value in values for _ in range(4)], [at for at in range(40) for _ in range(4)])
    spread = chance([value for value in values for _ in range(4)], list(range(160)))
    assert alone is not None and four_each is not None and spread is not None
    assert (four_each.low, four_each.high) == (alone.low, alone.high)
    assert spread.high - spread.low < 0.6 * (alone.high - alone.low)


def test_many_prompts_take_little_memory() -> None:
    values, prompts = [(number % 7) / 7 for number in range(20_000)], list(range(20_000))
    tracemalloc.start()
    try:
        chance(values, prompts, resamples=200)
        assert tracemalloc.get_traced_memory()[1] < 60 << 20  # all 200 at once: 96 MB
    finally:
        tracemalloc.stop()


def test_where_all_are_alike_the_interval_is_that_of_clopper_and_pearson() -> None:
    none, every = chance([0.0] * 10, list(range(10))), chance([1.0] * 10, list(range(10)))
    assert none is not None and every is not None
    # The tables' upper limit for 0 of 10 is 30.85 %.
    assert (none.low, none.high) == (0.0, pytest.approx(0.3085, abs=5e-5))
    assert (every.low, every.high) == (pytest.approx(1 - 0.3085, abs=5e-5), 1.0)
    one = chance([0.5, 0.75], [3, 3])  # one prompt says next to nothing
    assert one is not None
    assert one.low < 0.05 and one.high > 0.95


def test_differences_reach_down_to_minus_one() -> None:
    found = chance([0.0] * 10, list(range(10)), floor=-1.0)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(-0.3085, abs=5e-5), pytest.approx(0.3085, abs=5e-5))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_all_cuts_and_each_class_that_occurs() -> None:
    cuts = [audited(0, keep=0.0), audited(1, keep=0.25), audited(2, LOOP, keep=0.0, whole=1.0, alone=True)]
    rows = rows_of(cuts, seed=0)
    assert [(row.kind, row.cuts) for row in rows] == [(ALL, 3), (BEFORE, 2), (LOOP, 1)]
    everything, before, loop = rows
    means = {source: found.mean if found else None for source, found in everything.chances.items()}
    assert means["keep"] == pytest.approx(0.25 / 3)
    assert (means["whole"], means["uncut_keep"], means["trigger"]) == (1.0, 0.75, 0.25)
    assert everything.recoverable is not None and everything.recoverable.mean == pytest.approx(1 / 3)
    assert before.kept_against_uncut is not None and before.trigger_against_uncut is not None
    assert before.kept_against_uncut.mean == pytest.approx(0.125 - 0.75)
    assert before.trigger_against_uncut.mean == pytest.approx(-0.5)
    assert loop.kept_against_uncut is None and loop.chances["uncut_keep"] is None


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_sentences_say_what_the_intervals_allow() -> None:
    clear = [audited(number, trigger=0.25 * (number % 2)) for number in range(40)]
    text = " ".join(sentences(an_audit(clear)))
    assert "Audited 40 of 50 cuts: 40 before the answer." in text
    assert "recoverable by this student in 100 %" in text
    assert "At the trigger length, cut against uncut rollouts: -62 points" in text and "pairs, worse." in text
    equal = [audited(number, keep=0.75 + 0.25 * (-1) ** number) for number in range(40)]
    assert (
        "+0 points" in " ".join(sentences(an_audit(equal))) and "no clear difference" in sentences(an_audit(equal))[3]
    )
    assert "too narrow" not in text


def test_few_prompts_and_missing_references_are_said() -> None:
    text = " ".join(sentences(an_audit([audited(number, alone=True) for number in range(5)], fired=5)))
    assert "all 5 cuts on record" in text
    assert "no uncut rollout was left to compare with" in text
    assert "Only 5 prompts" in text
    unjudged = dict.fromkeys(SOURCES)
    assert "an unknown share" in " ".join(sentences(an_audit([audited(0, alone=True, **unjudged)])))


def test_the_table_has_a_policy_in_every_row() -> None:
    cuts = [audited(0), audited(1, AFTER)]
    printed, page = text_of(an_audit(cuts, applied="shadow")), markdown_of(an_audit(cuts))
    assert printed.count("kat (shadow)") == 3
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [line.split(" | ")[0] for line in table[2:]] == ["| kat"] * 3
    assert max(len(line) for line in printed.splitlines()) <= 120
    assert "uncut rollouts: 0 of 2 have the cut one's prompt" in printed


def test_a_row_a_cut() -> None:
    first, second = csv.DictReader(io.StringIO(csv_of(an_audit([audited(0), audited(1, LOOP, alone=True, whole=0.0)]))))
    assert (first["rid"], first["class"], first["keep"], first["correct_keep"]) == ("r000000000", BEFORE, "40", "0.5")
    assert (first["correct_whole"], first["uncut_rid"]) == ("", "r000001000")
    assert (second["correct_whole"], second["correct_uncut_keep"], second["uncut_rid"]) == ("0", "", "")


def test_the_tree_is_json_and_holds_every_chance() -> None:
    tree = tree_of(an_audit([audited(0), audited(1)]))
    assert set(tree["classes"][ALL]["correct"]) == set(SOURCES)
    assert tree["classes"][ALL]["correct"]["whole"] is None
    assert tree["classes"][BEFORE]["correct"]["keep"]["mean"] == 0.5


def test_the_plot_shows_every_source_that_there_is() -> None:
    (axes,) = draw(an_audit([audited(0), audited(1, AFTER)])).axes
    assert next(label.get_text() for label in axes.get_xticklabels()) == "all cuts\n2 cuts"
    assert len(axes.containers) == len(SOURCES)
    keep = next(one for one in axes.containers if one.get_label() == "student, from the kept prefix")
    assert keep.lines[0].get_ydata().tolist() == [0.5, 0.5, 0.5]
