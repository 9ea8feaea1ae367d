"""Fired and stopped have one meaning each: all who show one of them agree, whether cuts are applied or not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import step_line, write_lines
from samples import Run

from actors.arbiter import Arbiter
from actors.books import Booking, Books, line_of
from common import metrics
from common.rids import rid_of
from common.runfiles.run import RunFolder
from common.wire.messages import Verdict
from learner.drift import drift_of
from learner.intake import read_trajectory
from ops.audit import cuts as audit_cuts
from ops.chaos.checker import count_folder
from ops.live.growth import Folder
from ops.reach.embedded import EmbeddedRedis
from ops.replay.record import read_record
from ops.replay.verdicts import Replay, reproduced
from ops.report.data import fired_share, sample_traces
from ops.report.run import read_run
from ops.report.series import fired_curve
from ops.run.tracking import Follower

DEAD, ALIVE = [1.0] * 4 + [0.0] * 12, [1.0] * 16
FIRED, TREATED, ALL = 5, 8, 11  # rollouts 0 … 4 are treated and dead, up to 7 treated and alive; the rest control, dead
SHARE = FIRED / TREATED
RULE = {"window": 4, "patience": 2, "stride": 1, "grace_tokens": 0, "control_fraction": 0.25}


def write(run: Run, number: int) -> None:
    rid, values = rid_of(number), ALIVE if FIRED <= number < TREATED else DEAD
    arm = "treated" if number < TREATED else "control"
    assert run.admit(rid, arm=arm, problem=number, seed=7, max_new_tokens=64) == b"ok"
    run.take("w1", rid)
    for seq, start in enumerate((0, 8)):
        tokens = range(start + 1, start + 9)
        run.chunk(rid, rid, seq=seq, start=start, tokens=tokens, finish="eos" if start else None)
        run.score(rid, seq=seq, values=values[start : start + 8])


def judge(run: Run) -> list[Verdict]:
    run.client.set(run.key("threshold"), "0.25")
    for number in range(ALL):
        write(run, number)
    Arbiter(run.config, run.plane, threading.Event()).run(until_idle=True)
    return [Verdict.decode(run.field(rid_of(number), "verdict") or b"") for number in range(ALL)]


def book(folder: Path, verdicts: Sequence[Verdict]) -> None:
    books = Books(folder, record_traces=True)
    facts = {"ending": "trained", "reason": "", "generated": 16, "staleness": 0, "active": True, "correct": True}
    times = {"admitted_unix_s": 1.0, "verdict_unix_s": 2.0, "ended_unix_s": 3.0}
    books.write([Booking(replace(line_of(one, **facts), **times), one) for one in verdicts])  # type: ignore[arg-type]
    books.close()


def counter(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"katana_{name}", labels) or 0.0


def positions() -> list[float]:
    """How often the policy fired in each arm, and the sum of the positions."""
    names = [f"fired_position_tokens_{what}" for what in ("count", "sum")]
    return [counter(name, arm=arm) for arm in ("treated", "control") for name in names]


@pytest.mark.parametrize(("setting", "stops"), [({}, True), ({"shadow": True}, False), ({"apply": "mask"}, False)])
def test_all_agree_on_what_fired_and_what_was_stopped(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], setting: dict[str, object], stops: bool
) -> None:
    run = start(embedded_redis, termination=RULE | setting)
    folder, stopped = run.config.run_dir, FIRED if stops else 0
    before = {name: counter(name, **labels) for name, labels in STOPS.items()}
    fired_before = positions()
    verdicts = judge(run)
    book(folder, verdicts)
    folder.joinpath("config.yaml").write_text(run.config.to_yaml())
    folder.joinpath("ledger.json").write_text(json.dumps({}))
    write_lines(folder / "metrics.jsonl", [step_line(1)])

    # Fired: the arbiter's metric, the drift guards, katana top, the trackers, the report, the audit, the replay.
    assert counter("kat_cut_rate") == SHARE
    # Windows of 4 are dead from the eighth token on: it fires at the ninth.
    found = [after - then for after, then in zip(positions(), fired_before, strict=True)]
    assert found == [FIRED, 9.0 * FIRED, ALL - TREATED, 9.0 * (ALL - TREATED)]
    batch = [read_trajectory(run.client.hgetall(run.key(f"rollout:{one.rid}")), 1000) for one in verdicts]
    drift = drift_of(batch)
    assert (drift.cut_rate_treated, drift.cut_rate_control) == (SHARE, 1.0)
    looked = Folder(folder)
    looked.read()
    assert looked.cut_rate() == SHARE
    follower = Follower(folder)
    points = [*follower.look().points, *follower.look(over=True).points]
    [point] = [one for one in points if one.kind == "rollout"]
    assert point.values["kat/cut_rate"] == SHARE
    lines = read_run(folder).lines
    assert fired_share(lines) == (FIRED, TREATED)
    assert [(one.share, one.count) for one in fired_curve(lines)] == [(SHARE, TREATED)]
    samples = sample_traces(RunFolder(folder), 100)
    assert {kind: one.found for kind, one in samples.items()} == {
        "treated": FIRED,
        "control": ALL - TREATED,
        "uncut": TREATED - FIRED,
        "booked": ALL,
    }
    audited = audit_cuts.read_records(RunFolder(folder), lines)
    assert sum(one.fired for one in audited if one.arm == "treated") == FIRED
    record = read_record(folder, "all" if not stops else None)
    assert reproduced(record, Replay(record).as_recorded(run.config.termination)) == ALL

    # Stopped: the verdicts, the metrics of arbiter and feeder, the traces, the audit, the replay, the checker.
    assert sum(one.stopped for one in verdicts) == stopped
    assert {name: counter(name, **labels) - before[name] for name, labels in STOPS.items()} == dict.fromkeys(
        STOPS, stopped
    )
    assert [sum(one.stopped for one in samples[kind].traces) for kind in ("treated", "booked")] == [stopped, stopped]
    assert sum(one.whole is None for one in audited) == stopped
    assert sum(one.stopped for one in record.rollouts) == stopped
    assert count_folder(folder).cut == stopped


STOPS = {
    "stop_signals_total": {"reason": "kl_trap"},
    "rollouts_finished_total": {"arm": "treated", "reason": "kl_trap"},
    "stop_overshoot_tokens_count": {"arm": "treated"},
}
