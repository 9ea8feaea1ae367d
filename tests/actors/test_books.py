"""The books: lines that add up, are written once, and survive a torn end."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Histogram
from samples import make_verdict

from actors.books import Booked, Booking, Books, count, line_of, unjudged_line
from common import metrics
from common.metrics import REGISTRY
from common.rids import rid_of
from common.runfiles.lines import read_lines
from common.runfiles.records import BookLine, Trace
from ops.stats.saving import length_saving


def line(rid: str = "r1", **changes: Any) -> Any:
    values: dict[str, Any] = {
        "ending": "trained",
        "reason": "",
        "generated": 7,
        "staleness": 1,
        "active": True,
        "correct": None,
    }
    return line_of(make_verdict(rid), **(values | changes))


def value(metric: Any, *labels: str) -> float:
    return float(metric.labels(*labels)._value.get())


def test_a_line_by_hand() -> None:
    """Trigger 3, keep 2, seven written: one token of detection, four of overshoot."""
    one = line()
    assert (one.tokens_generated, one.tokens_kept, one.tokens_trained) == (7, 2, 2)
    assert (one.tokens_detection, one.tokens_overshoot) == (1, 4)
    assert one.ledger_field == "trained"


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 30), st.sampled_from(["trained", "dropped", "dead"]))
@settings(deadline=None)
def test_generated_is_kept_and_detection_and_overshoot(a: int, b: int, generated: int, ending: str) -> None:
    keep, trigger = sorted((a, b))
    verdict = make_verdict(
        keep=keep,
        trigger=trigger,
        train=keep,
        tokens=np.arange(9, dtype=np.int32),
        divergence=np.zeros(9, np.float32),
    )
    how: dict[str, Any] = {"reason": "stale", "staleness": None, "active": True, "correct": True}
    one = line_of(verdict, ending=ending, generated=generated, **how)
    assert one.tokens_generated == one.tokens_kept + one.tokens_detection + one.tokens_overshoot
    assert min(one.tokens_kept, one.tokens_detection, one.tokens_overshoot) >= 0
    assert one.tokens_trained == (keep if ending == "trained" else 0)
    assert one.tokens_trainable == keep


@pytest.mark.parametrize(("ending", "trained"), [("trained", 3), ("dropped", 0), ("dead", 0)])
def test_tokens_trainable_is_that_of_the_verdict_for_every_ending(ending: str, trained: int) -> None:
    """It is not `keep`: a complete control rollout may be trained on."""
    verdict = make_verdict(keep=2, train=3)
    one = line_of(verdict, ending=ending, reason="", generated=7, staleness=1, active=True, correct=None)
    assert (one.tokens_kept, one.tokens_trained, one.tokens_trainable) == (2, trained, 3)


def test_the_ledgers_field_names_the_reason_of_a_drop() -> None:
    assert line(ending="dropped", reason="stale").ledger_field == "dropped:stale"
    assert line(ending="dead", reason="arbiter").ledger_field == "dead"


def test_an_unjudged_rollouts_line() -> None:
    one = unjudged_line("r1", "control", 5, ending="dropped", reason="run_end", generated=9)
    assert (one.arm, one.problem, one.finish_reason, one.active) == ("control", 5, "unfinished", False)
    assert one.tokens_generated == one.tokens_kept + one.tokens_detection + one.tokens_overshoot == 9
    assert (one.tokens_trained, one.tokens_trainable) == (0, None)


def test_lines_and_traces_are_read_back_from_disk(tmp_path: Path) -> None:
    books = Books(tmp_path / "run", record_traces=True)
    books.write([Booking(line("r1"), make_verdict("r1"))])
    books.write([Booking(unjudged_line("r2", "treated", 0, ending="dead", reason="rollout", generated=0))])
    books.close()
    first, second = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert (first["rid"], first["tokens_overshoot"], second["rid"]) == ("r1", 4, "r2")
    [trace] = read_lines(tmp_path / "run" / "traces.jsonl")
    assert np.frombuffer(base64.b64decode(trace["tokens"]), "<i4").tolist() == [1, 2, 3]
    assert np.frombuffer(base64.b64decode(trace["divergence"]), "<f4").tolist() == [0.5, 0.25, 0.0]
    assert trace == Trace.of(make_verdict("r1")).to_json()
    assert (trace["trigger"], trace["keep"], trace["threshold"]) == (3, 2, 0.25)


def test_without_traces_there_is_no_file_of_them(tmp_path: Path) -> None:
    books = Books(tmp_path, record_traces=False)
    books.write([Booking(line(), make_verdict())])
    books.close()
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_a_rollout_is_written_once_by_old_and_new_books(tmp_path: Path) -> None:
    for _ in range(2):
        books = Books(tmp_path, record_traces=True)
        for _ in range(2):
            books.write([Booking(line("r1", generated=9), make_verdict("r1"))])
        assert "r1" in books.booked and "r2" not in books.booked
        books.close()
    for name in ("rollouts.jsonl", "traces.jsonl"):
        assert len(list(read_lines(tmp_path / name))) == 1


@pytest.mark.parametrize("torn", [b'{"rid":"r2"', b"{", b"\xff\xfe", b"x" * 200_000])
def test_a_torn_end_is_cut_off_and_written_over(tmp_path: Path, torn: bytes) -> None:
    books = Books(tmp_path, record_traces=True)
    books.write([Booking(line("r1"), make_verdict("r1"))])
    books.close()
    for name in ("rollouts.jsonl", "traces.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    assert [one["rid"] for one in read_lines(tmp_path / "rollouts.jsonl")] == ["r1"]
    books = Books(tmp_path, record_traces=True)
    assert "r1" in books.booked and "r2" not in books.booked
    books.write([Booking(line("r2"), make_verdict("r2"))])
    books.close()
    for name in ("rollouts.jsonl", "traces.jsonl"):
        assert [json.loads(one)["rid"] for one in (tmp_path / name).read_bytes().splitlines()] == ["r1", "r2"]


def test_a_file_with_only_a_torn_line_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_bytes(b'{"rid":"r1","arm"')
    books = Books(tmp_path, record_traces=False)
    assert "r1" not in books.booked
    books.write([Booking(line("r1"))])
    books.close()
    assert [one["rid"] for one in read_lines(tmp_path / "rollouts.jsonl")] == ["r1"]


def test_booked_rollouts_need_no_memory_however_many_there_are() -> None:
    booked, others = Booked(), [rid_of(7), rid_of(0), "x1"]
    for rid in others:
        booked.add(rid)
    assert all(rid in booked for rid in others)
    assert rid_of(1) not in booked
    assert booked.next_number == 8
    for number in reversed(range(20_000)):
        booked.add(rid_of(number))
    assert booked.next_number == 20_000
    assert rid_of(19_999) in booked and rid_of(20_000) not in booked
    assert (booked._upto, len(booked._beyond)) == (20_000, 0)


def test_a_trace_whose_rollout_was_not_booked_is_cut_off(tmp_path: Path) -> None:
    """A crash between the two files leaves a trace that will be written again."""
    books = Books(tmp_path, record_traces=True)
    books.write([Booking(line("r1"), make_verdict("r1"))])
    books.close()
    with (tmp_path / "traces.jsonl").open("ab") as file:
        file.write(json.dumps(Trace.of(make_verdict("r2")).to_json(), separators=(",", ":")).encode() + b"\n")
    books = Books(tmp_path, record_traces=True)
    books.write([Booking(line("r2"), make_verdict("r2"))])
    books.close()
    assert [one["rid"] for one in read_lines(tmp_path / "traces.jsonl")] == ["r1", "r2"]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


def test_metrics_count_every_booked_line_once_in_every_process(tmp_path: Path) -> None:
    """A restarted feeder serves counters that agree with the file."""

    def seen() -> list[float]:
        return [
            value(metrics.rollouts_finished, "treated", "kl_trap"),
            value(metrics.tokens_generated, "treated"),
            value(metrics.tokens_trained, "treated"),
            value(metrics.tokens_detection, "treated"),
            value(metrics.tokens_overshoot, "treated"),
            value(metrics.trajectories_dropped, "stale"),
        ]

    before = seen()
    books = Books(tmp_path, record_traces=False)
    books.write([Booking(line("r1"))])
    books.write([Booking(line("r2", ending="dropped", reason="stale", generated=3))])
    books.write([Booking(line("r2", ending="dropped", reason="stale", generated=3))])
    books.close()
    once = [now - then for now, then in zip(seen(), before, strict=True)]
    assert once == [2, 10, 2, 2, 4, 1]
    Books(tmp_path, record_traces=False).close()
    assert [now - then for now, then in zip(seen(), before, strict=True)] == [2 * number for number in once]


def test_the_saving_by_the_metrics_is_that_of_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts that could not be cut, or that the run ended, count in neither, also after a restart of the feeder."""
    fresh = Histogram("compared", "", ["arm", "reason"], registry=None)
    monkeypatch.setattr(metrics, "rollout_length", fresh)
    compared = [line("r1", generated=40), line("r2", generated=8), replace(line("r3", generated=60), arm="control")]
    others = [
        line("r4", generated=900, active=False),
        line("r5", generated=901, ending="dropped", reason="run_end"),
        line("r6", generated=902, ending="dead", reason="rollout"),
    ]
    stale = line("r7", generated=30, ending="dropped", reason="stale")
    books = Books(tmp_path, record_traces=False)
    books.write([Booking(one) for one in [*compared, *others]])
    books.close()
    monkeypatch.setattr(metrics, "rollout_length", Histogram("compared", "", ["arm", "reason"], registry=None))
    books = Books(tmp_path, record_traces=False)  # the next feeder: all that is on record, counted once
    books.write([Booking(stale)])
    books.close()
    sums = {
        (sample.labels["arm"], sample.name): sample.value
        for family in metrics.rollout_length.collect()
        for sample in family.samples
        if sample.name in ("compared_sum", "compared_count")
    }
    mean = {arm: sums[arm, "compared_sum"] / sums[arm, "compared_count"] for arm in ("treated", "control")}
    assert mean == {"treated": (40 + 8 + 30) / 3, "control": 60}
    saving = length_saving(list(read_lines(tmp_path / "rollouts.jsonl", BookLine.from_json)))
    assert saving.ratio == 1 - mean["treated"] / mean["control"]


def test_the_metrics_have_the_lengths_of_trained_and_of_dropped_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a verdict the trainable length is unknown; for a lost rollout the written length too."""
    for name in ("ended_length", "ended_trainable"):
        monkeypatch.setattr(metrics, name, Histogram(name, "", ["reason"], registry=None))
    books = Books(tmp_path, record_traces=False)
    stale, empty = {"ending": "dropped", "reason": "stale"}, {"ending": "dropped", "reason": "empty"}
    judged = [line("r1"), line("r2", generated=9), line("r3", generated=30, **stale), line("r4", **empty)]
    judged[3] = replace(judged[3], tokens_trainable=0)
    judged.append(replace(line("r5", generated=40, **stale), tokens_trainable=None))  # of older books
    unjudged = [
        unjudged_line(rid, "treated", 0, ending=ending, reason=reason, generated=generated)
        for rid, ending, reason, generated in (
            ("r6", "dropped", "run_end", 12),
            ("r7", "dropped", "lost", 0),
            ("r8", "dead", "rollout", 5),
        )
    ]
    books.write([Booking(one) for one in (*judged, *unjudged)])
    books.close()

    def seen(histogram: Any) -> dict[str, tuple[float, float]]:
        """Reason → number of rollouts, and the sum of their tokens."""
        values = {(one.labels["reason"], one.name): one.value for one in next(iter(histogram.collect())).samples}
        name = histogram._name
        return {
            reason: (values[reason, f"{name}_count"], values[reason, f"{name}_sum"])
            for reason, kind in values
            if kind == f"{name}_count"
        }

    assert seen(metrics.ended_length) == {
        "trained": (2, 16),
        "stale": (2, 70),
        "empty": (1, 7),
        "run_end": (1, 12),
        "dead": (1, 5),
    }
    assert seen(metrics.ended_trainable) == {"trained": (2, 4), "stale": (1, 2), "empty": (1, 0)}


@pytest.mark.parametrize(("reason", "observed"), [("fixed", 1), ("kl_trap", 1), ("eos", 0), ("length", 0)])
def test_overshoot_is_observed_only_for_stopped_rollouts(reason: str, observed: int) -> None:
    """A rollout that continues after its trigger under `mask` or `shadow` ends by itself: its tokens are not an
    overshoot."""

    def seen() -> float:
        return REGISTRY.get_sample_value("katana_stop_overshoot_tokens_count", {"arm": "treated"}) or 0

    keep = 3 if reason == "fixed" else 2
    verdict = make_verdict(finish_reason=reason, keep=keep, train=keep, cut=observed == 1)
    how: dict[str, Any] = {"reason": "", "staleness": 0, "active": True, "correct": None}
    line, before = line_of(verdict, ending="trained", generated=7, **how), seen()
    count(line)
    assert seen() == before + observed
