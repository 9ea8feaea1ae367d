"""A replay gives the arbiter's verdicts: its windows are Kat's, and a record of the real arbiter comes out the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Run

from actors.arbiter import Arbiter
from actors.books import line_of
from common import policies
from common.config import ConfigError
from common.draws import rollout_seed
from common.policies import Situation
from common.rids import rid_of
from common.runfiles.records import Trace
from common.termination import Cut, Kat
from common.wire.messages import Verdict
from common.wire.plane import unix_s
from ops.reach.embedded import EmbeddedRedis
from ops.replay.record import read_record
from ops.replay.verdicts import Replay, Shape, Windows, reproduced

pytestmark = pytest.mark.slow

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "kat_rule.json").read_text())["cases"]
COUNT, CHUNK = 32, 7
MINE = "own_policy:Halved"

# --- the rule ---


def rule_of(shape: Shape, patience: int, threshold: float | None) -> Kat:
    return Kat(
        window=shape.window,
        patience=patience,
        stride=shape.stride,
        grace_tokens=shape.grace_tokens,
        threshold=threshold,
        inverse=shape.inverse,
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_windows_are_kats_also_where_a_mean_equals_the_threshold(inverse: bool) -> None:
    rng = np.random.default_rng(4)
    fired = 0
    for _ in range(400):
        shape = Shape(int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(rng.integers(0, 5)), inverse)
        patience, length = int(rng.integers(1, 5)), int(rng.integers(0, 60))
        # Few values, so that means tie; some so small that units of 2^-60 nats cut them off.
        values = rng.choice([0.0, 1e-19, 3e-12, 0.1, 0.3, 0.7, 25.0], length).astype(np.float32)
        whole = rule_of(shape, patience, None)
        whole.feed(values)
        windows = Windows(values, shape)
        assert windows.minimum() == whole.min_window
        part = values[: int(rng.integers(0, length + 1))].astype(np.float64)
        levels = [0.1, float(part.mean()) if len(part) else 0.0, whole.min_window or 0.0]
        for threshold in [level for one in levels for level in (one, np.nextafter(one, 2), np.nextafter(one, -1))]:
            rule = rule_of(shape, patience, float(threshold))
            cut = rule.feed(values)
            assert windows.cut(float(threshold), patience, "kl_high" if inverse else "kl_trap") == cut
            if cut is not None:
                assert windows.minimum(cut.trigger) == rule.min_window
                fired += 1
    assert fired > 500


def test_windows_agree_with_the_vectors() -> None:
    assert len(VECTORS) == 200
    for case in VECTORS:
        shape = Shape(case["window"], case["stride"], case["grace_tokens"], False)
        windows = Windows(np.array(case["divergence"], dtype=np.float64), shape)
        cut = None if case["threshold"] is None else windows.cut(case["threshold"], case["patience"], "kl_trap")
        assert (None if cut is None else cut.keep) == case["keep"]
        least, wanted = windows.minimum(cut and cut.trigger), case["min_window"]
        assert least == wanted or (least is not None and least == pytest.approx(wanted, rel=1e-12))


# --- a record of the real arbiter ---


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Callable[..., Run]:
    return lambda **overrides: start(embedded_redis, **overrides)


def divergences(seed: int) -> list[list[float]]:
    """Around 0.5 nats, most with a stretch that is low."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(COUNT):
        values = rng.gamma(2.0, 0.25, size=int(rng.integers(1, 48)))
        low = int(rng.integers(0, 40))
        values[low : low + int(rng.integers(0, 14))] *= 0.1
        found.append([float(value) for value in values.astype(np.float32)])
    return found


def falls(seed: int) -> list[list[float]]:
    """Around 0.5 nats, and nearly 0 from token 24 on: what a test of the mean needs to be sure."""
    rng = np.random.default_rng(seed)
    wholes = [rng.uniform(0.4, 0.6, 48) * np.where(np.arange(48) < 24, 1, 0.01) for _ in range(COUNT)]
    return [[float(value) for value in whole[: rng.integers(1, 49)].astype(np.float32)] for whole in wholes]


def arm(place: int) -> str:
    return "control" if place % 4 == 0 else "treated"


def record(run: Run, values: list[list[float]], *, at_a_time: int = 1) -> Path:
    """Have the real arbiter judge these rollouts, so many written side by side; the run's folder, as books are kept."""
    for first in range(0, len(values), at_a_time):
        places = range(first, min(first + at_a_time, len(values)))
        for place in places:
            head = {"arm": arm(place), "problem": place, "seed": rollout_seed(run.config.seed, place)}
            run.admit(rid_of(place), **head, max_new_tokens=48)
            run.take("w1", rid_of(place))
        for start in range(0, 48, CHUNK):
            for place in places:
                write(run, place, values[place], start)
            if at_a_time > 1:
                judge(run)
        judge(run)
    return booked(run, len(values))


def judge(run: Run) -> None:
    Arbiter(run.config, run.plane, threading.Event()).run(until_idle=True)


def write(run: Run, place: int, values: list[float], start: int) -> None:
    """A chunk of a rollout, if it has one there and is not stopped."""
    rid, part = rid_of(place), values[start : start + CHUNK]
    if part and run.field(rid, "verdict") is None:
        finish = "eos" if start + CHUNK >= len(values) else None
        tokens, seq = [1 + at % 24 for at in range(start, start + len(part))], start // CHUNK
        assert run.chunk(rid, rid, seq=seq, start=start, tokens=tokens, finish=finish)[0] == b"ok"
        run.score(rid, seq=seq, values=part)


def booked(run: Run, count: int) -> Path:
    verdicts = {}
    for entry, values in run.client.xrange(run.key("finished")):
        if values[b"kind"] == b"verdict":
            verdicts[values[b"rid"].decode()] = (unix_s(entry), Verdict.decode(values[b"body"]))
    policy, lines, traces = policies.find(run.config.termination.policy), [], []
    for rid in map(rid_of, range(count)):
        moment, one = verdicts[rid]
        line = line_of(
            one,
            ending="trained" if one.train else "dropped",
            reason="" if one.train else "empty",
            generated=one.generated or len(one.tokens),
            staleness=0,
            active=policy.active(one.threshold),
            correct=None,
        )
        admitted = unix_s(run.field(rid, "entry") or b"")
        lines.append(asdict(replace(line, admitted_unix_s=admitted, verdict_unix_s=moment, ended_unix_s=moment)))
        traces.append(Trace.of(one).to_json())
    folder = run.config.run_dir
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(run.config.to_yaml())
    for name, items in (("rollouts", lines), ("traces", traces)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


KAT: dict[str, Any] = {"min_calibration": 6, "buffer_size": 8, "eta": 0.5}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "random": {},
    "repetition": {"ngram": 3},
    "kat": KAT,
    "kat_absolute": {"floor_nats": 0.2},
    "kat_inverse": KAT,
    "entropy": KAT,
    "margin_change": {"margin_threshold": 3.0, "margin_side": "rise"},
    "adaptive": {"adaptive_delta": 0.9, "adaptive_block": 2, "adaptive_range": 0.25},
    MINE: {"options": {"head": 3}},
    "own_policy:Marked": {"options": {"token": 20}},
    "own_policy:Sure": {"options": {"nats": 0.5}},
    "own_policy:SureOfWindows": KAT,
}


def start_of(begin: Callable[..., Run], **termination: Any) -> Run:
    return begin(termination=termination, rollout={"max_completion_length": 48})


@pytest.mark.parametrize("how", [{}, {"apply": "mask"}, {"shadow": True}], ids=["stop", "mask", "shadow"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_recorded_settings_give_the_recorded_verdicts(
    begin: Callable[..., Run], name: str, how: dict[str, Any]
) -> None:
    run = start_of(begin, policy=name, **POLICIES[name], **how)
    read = read_record(record(run, falls(3) if name == "adaptive" else divergences(3)))
    replayed, settings = Replay(read), run.config.termination
    verdicts = replayed.as_recorded(settings)
    assert reproduced(read, verdicts) == COUNT
    assert any(verdict.cut for verdict in verdicts) == (name != "none")
    # One rollout after the other: the number of its first score is that of its admission.
    computed = replayed.recomputed(settings.model_copy(update={"shadow": False, "apply": "stop"}))
    free = [place for place, one in enumerate(read.rollouts) if one.free]
    assert [computed[place] for place in free] == [verdicts[place] for place in free]
    assert read.whole == (bool(how) or name == "none")
    assert len(read.counted) == (COUNT if read.whole else COUNT // 4)


@pytest.mark.parametrize("name", ["kat", "kat_inverse"])
@pytest.mark.parametrize("calibrate_on", ["control", "completed", "all"])
def test_a_shadow_run_replayed_is_the_run_that_stops(begin: Callable[..., Run], calibrate_on: str, name: str) -> None:
    settings = KAT | {"policy": name, "calibrate_on": calibrate_on}
    stopping = start_of(begin, **settings)
    wanted = read_record(record(stopping, divergences(5)))
    shadow = start_of(begin, **settings | {"shadow": True, "eta": 0.2})
    read = read_record(record(shadow, divergences(5)))
    found = Replay(read).recomputed(stopping.config.termination)
    assert [one.number for one in found] == [one.threshold for one in wanted.rollouts]
    cuts = [one.cut for one in found]
    assert sum(cut is not None for cut in cuts) > 3
    for cut, one in zip(cuts, wanted.rollouts, strict=True):
        fired = one.keep < len(one.divergence) or one.stopped
        assert (cut and (cut.trigger, cut.keep)) == ((one.trigger, one.keep) if fired else None)


def test_rollouts_that_overlap_have_their_recorded_verdicts_by_their_recorded_numbers(
    begin: Callable[..., Run],
) -> None:
    run = start_of(begin, policy="kat", **KAT)
    read = read_record(record(run, divergences(7), at_a_time=4))
    verdicts = Replay(read).as_recorded(run.config.termination)
    assert reproduced(read, verdicts) == COUNT
    assert [one.known for one in read.rollouts] != list(range(COUNT))
    other = run.config.termination.model_copy(update={"patience": 3})
    assert reproduced(read, Replay(read).as_recorded(other)) < COUNT


def test_another_control_fraction_deals_the_arms_as_the_feeder_would(begin: Callable[..., Run]) -> None:
    run = start_of(begin, policy="kat", shadow=True, **KAT)
    read = read_record(record(run, divergences(9)))
    all_control = run.config.termination.model_copy(update={"control_fraction": 1.0, "shadow": False})
    least = [Windows(one.divergence, Shape.of(all_control)).minimum() for one in read.rollouts]
    known = [value for value in least if value is not None]
    replayed = Replay(read)
    before = known[:-1] if least[-1] is not None else known  # the last one's own is pushed behind it
    assert replayed.recomputed(all_control)[-1].number == pytest.approx(np.quantile(before[-8:], 0.5))
    numbers = {one.number for one in replayed.recomputed(all_control)}
    assert numbers != {one.number for one in replayed.recomputed(run.config.termination)}


def test_a_policy_that_cuts_behind_the_end_is_refused(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_of(begin, policy=MINE, options={"head": 3}, shadow=True)
    read = read_record(record(run, divergences(3)))
    monkeypatch.setattr("own_policy.Halved.feed", lambda self, divergence: Cut(99, 3, "halved"))
    with pytest.raises(ConfigError, match="trigger 99, keep 3; allowed"):
        Replay(read).recomputed(run.config.termination)


def test_random_draws_by_the_seed_of_the_rollout(begin: Callable[..., Run]) -> None:
    run = start_of(begin, policy="kat", shadow=True, **KAT)
    read = read_record(record(run, divergences(3)))
    settings = run.config.termination.model_copy(update={"policy": "random"})
    found = Replay(read).recomputed(settings)
    for place, (one, verdict) in enumerate(zip(read.rollouts, found, strict=True)):
        judge = policies.find("random")(settings, Situation(None, rollout_seed(run.config.seed, place), 48))
        assert verdict.cut == judge.feed(one.divergence)
