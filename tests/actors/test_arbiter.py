"""The real arbiter on a real Redis: its verdicts are those of the policy, for any arbiter and any order of scores."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import redis
from samples import Run, fenced, make_divergence, make_view

from actors.arbiter import Arbiter, PolicyBroken
from actors.books import line_of
from common import metrics
from common.draws import fraction, rollout_seed
from common.rids import rid_of
from common.runfiles.records import Trace
from common.termination import Cut, Kat, kat_verdict
from common.wire.lease import LeaseLost
from common.wire.messages import Verdict
from ops.chaos.checker import check_folder
from ops.reach.embedded import EmbeddedRedis

RULE = {"window": 4, "patience": 2, "stride": 1, "grace_tokens": 0}


def ids(first: int, end: int) -> list[int]:
    """1 … 9, again and again."""
    return [1 + place % 9 for place in range(first, end)]


@dataclass
class Writing:
    """A rollout that the test writes and scores, as far as Redis accepts it."""

    run: Run
    rid: str
    values: Sequence[float]
    arm: str = "treated"
    problem: int = 0
    step: int | None = None
    seed: int = 7
    max_tokens: int = 64
    finish: str = "eos"
    done: int = 0
    chunks: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        head = {"arm": self.arm, "problem": self.problem, "step": self.step, "seed": self.seed}
        assert self.run.admit(self.rid, **head, max_new_tokens=self.max_tokens) == b"ok"
        self.run.take("w1", self.rid)

    def go_on(self, size: int, version: int = 0) -> bool:
        """Write and score the next chunk; False if there is none, or Redis answers that the rollout has ended."""
        part = list(self.values[self.done : self.done + size])
        if not part or self.ended:
            return False
        last = self.done + len(part) == len(self.values)
        reply = self.run.chunk(
            self.rid,
            self.rid,
            seq=self.chunks,
            start=self.done,
            tokens=ids(self.done, self.done + len(part)),
            finish=self.finish if last else None,
            version=version,
        )
        if reply[0] == b"ok":
            reply = [self.run.score(self.rid, seq=self.chunks, values=part)]
        self.ended = reply[0] == b"ended"
        self.done += len(part)
        self.chunks += 1
        return not self.ended

    def whole(self, size: int = 8) -> Writing:
        while self.go_on(size):
            pass
        return self


@pytest.fixture
def begin(embedded_redis: EmbeddedRedis, start: Callable[..., Run]) -> Callable[..., Run]:
    return lambda **overrides: start(embedded_redis, **overrides)


@pytest.fixture
def run(begin: Callable[..., Run]) -> Run:
    return begin()


def arbiter(run: Run) -> Arbiter:
    return Arbiter(run.config, run.plane, threading.Event())


def judge(run: Run) -> None:
    arbiter(run).run(until_idle=True)


def verdict(run: Run, rid: str) -> Verdict:
    return Verdict.decode(run.field(rid, "verdict") or b"")


def minima(run: Run) -> list[float]:
    return [float(value) for value in run.client.lrange(run.key("minima"), 0, -1)]


def threshold(run: Run) -> str:
    value = run.client.get(run.key("threshold"))
    return value.decode() if isinstance(value, bytes) else ""


def random_values(rng: np.random.Generator) -> list[float]:
    """Divergences around 0.5 with a stretch that is low, as float32."""
    values = rng.gamma(2.0, 0.25, size=int(rng.integers(1, 40)))
    low = int(rng.integers(0, 40))
    values[low : low + int(rng.integers(0, 12))] *= 0.1
    return [float(value) for value in values.astype(np.float32)]


@pytest.fixture
def cases(run: Run) -> Iterator[list[Writing]]:
    rng = np.random.default_rng(20240501)
    run.client.set(run.key("threshold"), "0.2")
    yield [
        Writing(run, f"r{number}", random_values(rng), arm="control" if number % 3 == 0 else "treated", problem=number)
        for number in range(45)
    ]


def check(run: Run, case: Writing) -> str:
    """Compare a verdict with the rule on the whole rollout; returns what happened."""
    found = verdict(run, case.rid)
    trigger, keep, lowest = kat_verdict(case.values, threshold=0.2, **RULE)
    _, _, lowest_of_all = kat_verdict(case.values, threshold=None, **RULE)
    total = len(case.values)
    assert (found.rid, found.arm, found.problem, found.threshold) == (case.rid, case.arm, case.problem, 0.2)
    assert found.keep == (total if keep is None else keep)
    assert found.trigger == (len(found.tokens) if trigger is None else trigger)
    assert found.train == found.keep
    assert found.min_window == (lowest if case.arm == "treated" else lowest_of_all)
    assert found.cut == (case.arm == "treated" and trigger is not None)
    assert found.finish_reason == ("kl_trap" if found.cut else case.finish)
    scored = len(found.tokens)
    assert found.tokens.tolist() == ids(0, scored)
    assert found.divergence.tolist() == list(case.values[:scored])
    if not found.cut:
        assert scored == total == found.generated
    elif scored < total:
        assert found.generated in (None, total)
    return f"{case.arm} {'fired' if trigger is not None else 'never'}"


def test_verdicts_are_those_of_the_rule_offline(run: Run, cases: list[Writing]) -> None:
    rng = np.random.default_rng(1)
    for case in cases:
        while case.go_on(int(rng.integers(1, 12))):
            pass
    judge(run)
    seen = [check(run, case) for case in cases]
    # The cases do tell the arms and the outcomes apart.
    assert min(seen.count(f"{arm} {what}") for arm in ("treated", "control") for what in ("fired", "never")) >= 3
    assert (run.pending("scores"), run.entries("scores")) == (0, [])
    assert run.entries("prompts") == []


def test_another_chunking_and_a_new_arbiter_after_every_chunk_change_no_verdict(run: Run, cases: list[Writing]) -> None:
    """Arbiters are killed: what they had read is still pending, so the next one starts where they started."""
    rng = np.random.default_rng(2)
    left, deaths = list(cases), 0
    while left:
        # The threshold in force moves on; what a rollout is judged by does not.
        for case in left:
            case.go_on(int(rng.integers(1, 12)))
            if case.chunks == 1:
                run.client.set(run.key("threshold"), "0.2")
        left = [case for case in left if not case.ended and case.done < len(case.values)]
        one = arbiter(run)
        one.open()
        one.step(block_s=0.01)
        run.client.delete(run.key("lease:arbiter"))  # killed: the lease runs out
        run.client.set(run.key("threshold"), "0.2")
        deaths += 1
    judge(run)
    assert deaths > 5
    for case in cases:
        check(run, case)
    bodies = [one["rid"] for one in run.entries("finished") if one["kind"] == "verdict"]
    assert sorted(bodies) == sorted(case.rid for case in cases)


def test_an_arbiter_that_lost_its_lease_writes_nothing_more(run: Run) -> None:
    old = arbiter(run)
    old.open()
    Writing(run, "r1", [0.5] * 5).whole()
    run.client.delete(run.key("lease:arbiter"))
    judge(run)
    stored = run.field("r1", "verdict")
    Writing(run, "r2", [0.5] * 5).whole()
    new = arbiter(run)
    new.open()
    with pytest.raises(LeaseLost):
        old.step(block_s=0.01)
    assert run.field("r2", "verdict") is None
    assert run.field("r1", "verdict") == stored
    new.close()


# --- what becomes of a verdict ---


def test_a_trap_by_hand_is_cut_where_it_began_and_its_writer_is_signalled(run: Run) -> None:
    # W 4, C 2, s 0.25: means of windows ending at 4, 5 …: 1, 0.75, 0.5, 0.25, 0, 0. Below 0.25 first at 8, fires at 9.
    run.client.set(run.key("threshold"), "0.25")
    Writing(run, "r1", [1.0] * 4 + [0.0] * 8).whole(5)
    judge(run)
    found = verdict(run, "r1")
    assert (found.trigger, found.keep, found.train, found.cut) == (9, 4, 4, True)
    assert found.min_window == 0.0
    assert run.entries("signals:w1") == [{"rid": "r1"}]
    assert run.entries("trajectories") == [{"rid": "r1"}]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_stops_whose_answer_is_lost_are_counted_once_each(
    run: Run, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    run.client.set(run.key("threshold"), "0.25")
    for rid in ("r1", "r2"):
        Writing(run, rid, [1.0] * 4 + [0.0] * 8).whole(5)
    stops = metrics.stop_signals.labels("kl_trap")
    before = stops._value.get()
    patiently, lost = run.plane.patiently, []

    def losing(action: Callable[[], Any], what: str, *kind: Any) -> Any:
        def once() -> Any:
            answer = action()
            if what == "verdict" and len(lost) < times:
                lost.append(answer)
                raise redis.exceptions.ConnectionError("the answer is lost")
            return answer

        return patiently(once, what, *kind)

    monkeypatch.setattr(run.plane, "patiently", losing)
    judge(run)
    assert len(lost) == times
    assert stops._value.get() == before + 2
    assert run.entries("signals:w1") == [{"rid": "r1"}, {"rid": "r2"}]
    judge(run)
    assert stops._value.get() == before + 2


def test_a_trap_at_the_very_start_leaves_nothing_and_is_dropped_as_empty(run: Run) -> None:
    run.client.set(run.key("threshold"), "0.25")
    Writing(run, "r1", [0.0] * 12).whole()
    judge(run)
    assert (verdict(run, "r1").trigger, verdict(run, "r1").keep) == (5, 0)
    assert run.entries("trajectories") == []
    assert run.entries("finished")[1:] == [{"kind": "ending", "rid": "r1", "ending": "dropped", "reason": "empty"}]


@pytest.mark.parametrize(("trains", "train"), [("kept", 4), ("whole", 12)])
def test_a_control_rollout_is_never_stopped(begin: Callable[..., Run], trains: str, train: int) -> None:
    run = begin(termination={"control_trains": trains})
    run.client.set(run.key("threshold"), "0.25")
    # Behind the would-be cut come windows that are lower still: the minimum is over the whole rollout.
    case = Writing(run, "r1", [1.0] * 4 + [0.125] * 4 + [0.0] * 4, arm="control")
    case.go_on(10)
    judge(run)
    assert run.field("r1", "verdict") is None
    case.whole()
    judge(run)
    found = verdict(run, "r1")
    assert (found.keep, found.trigger, found.train) == (4, 9, train)
    assert (found.cut, found.finish_reason, found.generated) == (False, "eos", 12)
    assert found.min_window == 0.0
    assert run.entries("signals:w1") == []


def test_an_inactive_rule_cuts_nothing_and_records_minima(run: Run) -> None:
    Writing(run, "r1", [1.0] * 4 + [0.0] * 8, finish="length").whole()
    judge(run)
    found = verdict(run, "r1")
    assert (found.cut, found.keep, found.threshold, found.finish_reason) == (False, 12, None, "length")
    assert minima(run) == [0.0]


def test_a_rollout_too_short_for_a_window_pushes_nothing(run: Run) -> None:
    Writing(run, "r1", [0.5] * 3).whole()
    judge(run)
    assert verdict(run, "r1").min_window is None
    assert minima(run) == []


def test_a_verdict_waits_for_the_last_score(run: Run) -> None:
    case = Writing(run, "r1", [0.5] * 12)
    case.go_on(8)
    run.chunk("r1", "r1", seq=1, start=8, tokens=range(9, 13), finish="eos")
    judge(run)
    assert run.field("r1", "verdict") is None
    assert run.pending("scores") == 1
    run.score("r1", seq=1, values=[0.5] * 4)
    judge(run)
    assert len(verdict(run, "r1").tokens) == 12


def test_a_verdict_names_the_oldest_and_the_newest_version_of_its_tokens(run: Run) -> None:
    case = Writing(run, "r1", [0.5] * 12)
    for version in (3, 4, 6):
        case.go_on(4, version=version)
    judge(run)
    assert (verdict(run, "r1").first_version, verdict(run, "r1").last_version) == (3, 6)


@pytest.mark.parametrize(("length", "kept", "cut"), [(5, 5, False), (6, 6, False), (7, 6, True)])
def test_policy_fixed_cuts_only_what_is_longer(begin: Callable[..., Run], length: int, kept: int, cut: bool) -> None:
    run = begin(termination={"policy": "fixed", "fixed_tokens": 6})
    Writing(run, "r1", [0.0] * length).whole(4)
    judge(run)
    found = verdict(run, "r1")
    assert (found.keep, found.cut, found.finish_reason) == (kept, cut, "fixed" if cut else "eos")


def test_policy_none_cuts_nothing(begin: Callable[..., Run]) -> None:
    run = begin(termination={"policy": "none"})
    run.client.set(run.key("threshold"), "9.0")
    Writing(run, "r1", [0.0] * 30).whole()
    judge(run)
    assert (verdict(run, "r1").cut, verdict(run, "r1").keep) == (False, 30)


LOW, HIGH = [1.0] * 4 + [0.0] * 8, [0.0] * 4 + [1.0] * 8
LONG = [1.0] * 24 + [0.0] * 24
POLICIES = {
    "none": (LOW, {}, None, None),
    "fixed": (LOW, {"fixed_tokens": 6}, None, Cut(6, 6, "fixed")),
    "scheduled": (LOW, {"fixed_tokens": 3, "scheduled_tokens": 9}, "7.0", Cut(7, 7, "scheduled")),
    "random": (LOW, {}, None, None),
    "random_matched": (LOW, {"hazard": {9: 1.0}, "detection_tokens": 5}, "1.0", Cut(9, 4, "random")),
    "repetition": (LOW, {"ngram": 2}, None, Cut(11, 9, "repetition")),
    "kat": (LOW, {}, "0.25", Cut(9, 4, "kl_trap")),
    "kat_absolute": (LOW, {"floor_nats": 0.25}, "0.25", Cut(9, 4, "kl_trap")),
    "kat_inverse": (HIGH, {}, "0.75", Cut(9, 4, "kl_high")),
    "entropy": (HIGH, {}, "0.25", Cut(9, 4, "low_entropy")),
    # Margins 0 four times, then -3, cut to -2: 1.5 more each, beyond 4 at the third.
    "margin_change": (HIGH, {"margin_threshold": 4.0}, "4.0", Cut(7, 4, "margin_change")),
    # At 32 ε is 1.09 for the split at 24, at 36 it is sqrt(2 · 2/9 · 4.97 / 8) + 2 · 4.97 / 24 = 0.94: below 1 - 0.
    "adaptive": (LONG, {"adaptive_delta": 0.5, "adaptive_block": 4}, "0.5", Cut(36, 24, "adaptive")),
    "own_policy:Halved": (LOW, {"options": {"head": 3}}, None, Cut(6, 4, "halved")),
    "own_policy:Marked": (LOW, {"options": {"token": 7}}, None, Cut(7, 6, "marked")),  # ids are 1 … 9
    "own_policy:Sure": (HIGH, {"options": {"nats": 0.5}}, None, Cut(6, 4, "sure")),
    "own_policy:Summed": (LOW, {"options": {"head": 3}}, None, Cut(6, 4, "summed")),  # numpy's integers
}


def wanted_cut(name: str) -> Cut | None:
    if name == "random":
        position = 1 + int(fraction(7, "cut") * 64)
        return Cut(position, position, "random") if position < 12 else None
    return POLICIES[name][3]


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_the_verdict_that_it_gives_by_hand(begin: Callable[..., Run], name: str, size: int) -> None:
    values, changes, number, _ = POLICIES[name]
    run = begin(termination={"policy": name, **changes})
    if number:
        run.client.set(run.key("threshold"), number)
    Writing(run, "r1", values).whole(size)
    judge(run)
    found, cut = verdict(run, "r1"), wanted_cut(name)
    if cut is None:
        assert (found.cut, found.keep, found.train, found.finish_reason) == (False, 12, 12, "eos")
    else:
        assert (found.cut, found.trigger, found.keep, found.finish_reason) == (True, cut.trigger, cut.keep, cut.reason)
        assert found.train == cut.keep
        assert run.entries("signals:w1") == [{"rid": "r1"}]
    assert found.threshold == (float(number) if number else None)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("none", "random")])
@pytest.mark.parametrize(
    ("how", "trained"),
    [({"apply": "mask"}, "kept"), ({"shadow": True}, "all"), ({"shadow": True, "apply": "mask"}, "all")],
)
@pytest.mark.parametrize("arm", ["treated", "control"])
def test_mask_and_shadow_stop_nothing_and_record_the_cut(
    begin: Callable[..., Run], name: str, how: dict[str, Any], trained: str, arm: str
) -> None:
    values, changes, number, cut = POLICIES[name]
    assert cut is not None
    run = begin(termination={"policy": name, **changes, **how})
    if number:
        run.client.set(run.key("threshold"), number)
    case = Writing(run, "r1", values, arm=arm)
    case.go_on(10)
    judge(run)
    assert run.field("r1", "verdict") is None
    case.whole()
    judge(run)
    found = verdict(run, "r1")
    assert (found.cut, found.finish_reason, found.generated) == (False, "eos", len(values))
    assert (found.trigger, found.keep) == (cut.trigger, cut.keep)
    assert found.train == (cut.keep if trained == "kept" else len(values))
    assert found.min_window == (1.0 if name == "kat_inverse" else 0.0)  # of the entropy where that is judged by
    assert run.entries("signals:w1") == []
    written = len(values)
    line = line_of(found, ending="trained", reason="", generated=written, staleness=0, active=True, correct=None)
    assert line.tokens_kept + line.tokens_detection + line.tokens_overshoot == line.tokens_generated == written


def test_a_schedule_follows_the_steps(begin: Callable[..., Run]) -> None:
    changes = {"policy": "scheduled", "fixed_tokens": 4, "scheduled_tokens": 8, "scheduled_steps": 4}
    run = begin(termination=changes)
    assert run.lease("learner").call(fenced("publish", 9, 2, "v00000009.safetensors", "aa")) == [b"ok"]
    Writing(run, "r1", [0.5] * 6).whole()
    judge(run)
    assert (verdict(run, "r1").keep, threshold(run)) == (4, "6.0")
    Writing(run, "r2", [0.5] * 7).whole()
    judge(run)
    assert (verdict(run, "r2").keep, verdict(run, "r2").threshold) == (6, 6.0)


def test_kat_inverse_is_calibrated_on_the_greatest_windows(begin: Callable[..., Run]) -> None:
    run = begin(termination={"policy": "kat_inverse", "min_calibration": 2, "eta": 0.5})
    publish(run, 0)
    for number, level in enumerate((0.5, 1.0)):
        Writing(run, f"r{number}", [0.0] * 4 + [level] * 4 + [0.0] * 4, arm="control").whole()
        judge(run)
    assert minima(run) == [0.5, 1.0]
    assert float(threshold(run)) == 0.75


def test_entropy_is_calibrated_on_its_own_windows(begin: Callable[..., Run]) -> None:
    run = begin(termination={"policy": "entropy", "min_calibration": 2, "eta": 0.5})
    publish(run, 0)
    for number, level in enumerate((0.5, 0.75)):  # entropies 0.5 and 0.25 in the middle, 1 around it
        Writing(run, f"r{number}", [0.0] * 4 + [level] * 4 + [0.0] * 4, arm="control").whole()
        judge(run)
    assert minima(run) == [0.5, 0.25]
    assert float(threshold(run)) == 0.375


def test_a_cut_that_a_policy_cannot_have_made_ends_the_rollout_and_not_the_arbiter(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("own_policy.Halved.feed", lambda self, divergence: Cut(trigger=99, keep=3, reason="halved"))
    run = begin(termination={"policy": "own_policy:Halved", "options": {"head": 3}})
    Writing(run, "r1", LOW).whole()
    judge(run)
    assert run.field("r1", "verdict") == b"dead"


READS = {"policy": "own_policy:Sure", "options": {"nats": 0.5}}


def test_views_are_read_by_a_policy_that_reads_them_and_recorded_with_its_verdicts(begin: Callable[..., Run]) -> None:
    for termination, recorded, wanted in ((READS, False, True), ({}, False, False), ({}, True, True)):
        run = begin(termination=termination, feeder={"record_views": recorded})
        Writing(run, "r1", HIGH).whole(5)
        judge(run)
        found = verdict(run, "r1")
        assert (found.view is not None) == wanted
        if found.view is not None:
            # Stopped at 6 by the second chunk; the verdict has what was scored by then.
            np.testing.assert_array_equal(found.view, make_view(HIGH[: len(found.tokens)]).view, strict=True)


def test_a_view_that_is_not_there_or_does_not_fit_ends_the_rollout_with_the_reason(begin: Callable[..., Run]) -> None:
    reasons = {
        "no view": (b"", "its score has no view; a teacher of an earlier version stored it"),
        "short": (make_view([0.5]).encode(), "tokens and view do not match"),
        "broken": (b"\xc1", "view: not msgpack"),
    }
    for stored, reason in reasons.values():
        run = begin(termination=READS)
        case = Writing(run, "r1", HIGH)
        case.go_on(5)
        name = run.key("rollout:r1")
        run.client.hset(name, "v:0", stored) if stored else run.client.hdel(name, "v:0")
        judge(run)
        assert run.field("r1", "verdict") == b"dead"
        assert all(reason in letter["reason"] for letter in run.entries("dead"))


@pytest.mark.parametrize("how", [{}, {"apply": "mask"}, {"shadow": True}], ids=["stop", "mask", "shadow"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_checker_replays_every_verdict_and_sees_a_changed_one(
    begin: Callable[..., Run], name: str, how: dict[str, Any]
) -> None:
    _, changes, number, _ = POLICIES[name]
    run = begin(termination={"policy": name, **changes, **how}, rollout={"max_completion_length": 48})
    rng = np.random.default_rng(3)
    for place in range(24):
        if number:  # in force before the first score; the verdict of the one before has set its own
            run.client.set(run.key("threshold"), number)
        seed, arm = rollout_seed(run.config.seed, place), "control" if place % 4 == 0 else "treated"
        values = random_values(rng)
        if name == "adaptive":  # what can be sure needs more of the same
            values = 24 * values[:1] + [0.1 * one for one in values[:1]] * int(rng.integers(1, 24))
        Writing(run, rid_of(place), values, arm=arm, seed=seed, max_tokens=48).whole(5)
        judge(run)
    verdicts = [verdict(run, rid_of(place)) for place in range(24)]
    cuts = sum(one.keep < len(one.tokens) or one.cut for one in verdicts)
    assert (cuts > 0) == (name != "none")
    possible = {"verdict_replayed": 0, "within_verdict": 0}
    assert statements(run, verdicts) == possible
    if any(one.view is not None for one in verdicts):
        lacking = [replace(one, view=None) for one in verdicts]
        assert statements(run, lacking)["verdict_replayed"] == len(verdicts)
    fired = next((place for place, one in enumerate(verdicts) if one.cut or 0 < one.keep < len(one.tokens)), 1)
    verdicts[fired] = replace(verdicts[fired], keep=verdicts[fired].keep - 1)
    assert statements(run, verdicts)["verdict_replayed"] == 1


def statements(run: Run, verdicts: list[Verdict]) -> dict[str, int]:
    """Write books and traces of these verdicts as the feeder does; returns what the checker reports."""
    folder = run.config.run_dir
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(run.config.to_yaml())
    lines = [
        line_of(
            one,
            ending="trained",
            reason="",
            generated=one.generated or len(one.tokens),
            staleness=0,
            active=True,
            correct=None,
        )
        for one in verdicts
    ]
    for file, values in (("rollouts", map(asdict, lines)), ("traces", (Trace.of(one).to_json() for one in verdicts))):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    found = [one.statement for one in check_folder(folder)]
    return {name: found.count(name) for name in ("verdict_replayed", "within_verdict")}


# --- the threshold ---


def publish(run: Run, version: int) -> None:
    assert run.lease("learner").call(fenced("publish", version, version, f"v{version:08d}.safetensors", "aa")) == [
        b"ok"
    ]


def test_the_rule_is_active_once_there_are_enough_minima_and_the_policy_is_warm(begin: Callable[..., Run]) -> None:
    run = begin(termination={"min_calibration": 3, "warmup_steps": 2, "eta": 0.25})
    publish(run, 2)
    for number, level in enumerate((0.5, 0.25), start=1):
        Writing(run, f"r{number}", [level] * 6).whole()
        judge(run)
        assert threshold(run) == "inactive"
    Writing(run, "r3", [1.0] * 6).whole()
    judge(run)
    # 0.75 quantile of 0.25, 0.5, 1: place 1.5, halfway between 0.5 and 1.
    assert float(threshold(run)) == 0.75
    Writing(run, "r4", [0.5] * 6).go_on(3)
    assert run.field("r4", "threshold") == b"0.75"


def test_the_rule_stays_inactive_while_the_policy_is_cold(begin: Callable[..., Run]) -> None:
    run = begin(termination={"min_calibration": 1, "warmup_steps": 2})
    publish(run, 1)
    Writing(run, "r1", [0.5] * 6).whole()
    judge(run)
    assert threshold(run) == "inactive"
    publish(run, 2)
    Writing(run, "r2", [0.5] * 6, arm="control").whole()
    judge(run)
    assert float(threshold(run)) == 0.5


@pytest.mark.parametrize(
    ("mode", "counted"),
    [("control", [0.125]), ("completed", [0.125, 0.75]), ("all", [0.125, 0.75, 0.0])],
)
def test_once_active_the_chosen_rollouts_fill_the_buffer(
    begin: Callable[..., Run], mode: str, counted: list[float]
) -> None:
    run = begin(termination={"calibrate_on": mode, "min_calibration": 2})
    publish(run, 0)
    for number in range(2):
        Writing(run, f"c{number}", [0.5] * 6).whole()
        judge(run)
    assert threshold(run) == "0.5"
    Writing(run, "control", [0.125] * 6, arm="control").whole()
    judge(run)
    Writing(run, "whole", [0.75] * 6).whole()
    judge(run)
    run.client.set(run.key("threshold"), "0.5")
    cut = Writing(run, "cut", [1.0] * 4 + [0.0] * 6)
    cut.whole()
    judge(run)
    assert verdict(run, "cut").cut
    lowest = verdict(run, "cut").min_window
    expected = [lowest if value == 0.0 else value for value in counted]
    assert minima(run) == [0.5, 0.5, *expected]


def test_the_threshold_is_the_quantile_of_the_last_minima(begin: Callable[..., Run]) -> None:
    run = begin(termination={"calibrate_on": "all", "buffer_size": 8, "min_calibration": 4})
    rng = np.random.default_rng(5)
    levels = rng.random(12).astype(np.float32)
    for number, level in enumerate(levels):
        Writing(run, f"r{number}", [float(level)] * 4, arm="control").whole()
        judge(run)
    assert minima(run) == [float(level) for level in levels[-8:]]
    assert float(threshold(run)) == pytest.approx(np.quantile(levels[-8:].astype(np.float64), 0.7), rel=1e-12)


def test_an_arbiter_that_starts_on_an_active_run_continues_with_its_threshold(begin: Callable[..., Run]) -> None:
    """Verdicts that it finds due at its start count for the buffer, and set the threshold, as any other."""
    run = begin(termination={"min_calibration": 2, "warmup_steps": 2})
    publish(run, 2)
    for number in range(2):
        Writing(run, f"r{number}", [0.5] * 6).whole()
    judge(run)
    assert threshold(run) == "0.5"
    Writing(run, "late", [0.75] * 6).whole()
    run.score_entries()  # given to an arbiter that died
    judge(run)
    assert not verdict(run, "late").cut
    assert threshold(run) == "0.5"
    assert minima(run) == [0.5, 0.5]


# --- deterministic: verdicts in the order of admission ---


def test_a_verdict_waits_for_those_of_all_that_were_admitted_before(begin: Callable[..., Run]) -> None:
    run = begin(deterministic=True, termination={"calibrate_on": "all", "min_calibration": 2, "buffer_size": 4})
    levels = {"r1": 0.5, "r2": 0.25, "r3": 0.75, "r4": 1.0}
    cases = {rid: Writing(run, rid, [level] * 6, step=0) for rid, level in levels.items()}
    for rid in ("r4", "r2", "r3"):
        cases[rid].whole()
        judge(run)
    assert run.entries("finished") == []
    assert run.pending("scores") == 3
    # A rollout that died before it was due delays no other, and leaves no state.
    run.plane.fail("r2", "rollout", "poison", max_attempts=1)
    cases["r1"].go_on(3)
    judge(run)
    assert run.entries("trajectories") == []
    cases["r1"].whole()
    judge(run)
    assert [entry["rid"] for entry in run.entries("trajectories")] == ["r1", "r3", "r4"]
    assert minima(run) == [0.5, 0.75, 1.0]
    assert run.entries("scores") == []
    assert (run.pending("scores"), run.entries("prompts")) == (0, [])


def test_warm_up_counts_steps_not_how_often_the_weights_were_announced(begin: Callable[..., Run]) -> None:
    run = begin(deterministic=True, termination={"min_calibration": 1, "warmup_steps": 2})
    assert run.lease("learner").call(fenced("publish", 9, 1, "v00000009.safetensors", "aa")) == [b"ok"]
    Writing(run, "r1", [0.5] * 6, step=1).whole()
    judge(run)
    assert threshold(run) == "inactive"
    Writing(run, "r2", [0.5] * 6, step=2, arm="control").whole()
    judge(run)
    assert threshold(run) == "0.5"


# --- what is broken ---


def test_a_record_that_cannot_be_read_is_given_up_and_the_rest_is_judged(run: Run) -> None:
    Writing(run, "bad", [0.5] * 6).whole()
    run.client.hset(run.key("rollout:bad"), "d:0", b"\xc1 no msgpack")
    Writing(run, "good", [0.5] * 6).whole()
    judge(run)
    assert verdict(run, "good").keep == 6
    assert run.field("bad", "verdict") == b"dead"
    [dead] = run.entries("dead")
    assert (dead["rid"], dead["stage"]) == ("bad", "arbiter")
    endings = [one for one in run.entries("finished") if one["kind"] == "ending"]
    assert endings == [{"kind": "ending", "rid": "bad", "ending": "dead", "reason": "arbiter"}]
    assert run.pending("scores") == 0


def broken(field: str, value: bytes) -> Callable[[Run], Any]:
    return lambda run: run.client.hset(run.key("rollout:bad"), field, value)


@pytest.mark.parametrize(
    "damage",
    [
        broken("d:0", make_divergence([0.5] * 5).encode()),
        broken("head", b""),
        broken("length", b"2"),
        broken("length", b"many"),
        broken("chunks", b"?"),
        broken("threshold", b"low"),
        broken("threshold", b"nan"),
    ],
    ids=["other size", "no head", "length too small", "length no number", "chunks no number", "threshold", "nan"],
)
def test_no_damage_to_a_record_stops_the_arbiter(run: Run, damage: Callable[[Run], Any]) -> None:
    Writing(run, "bad", [0.5] * 6).whole()
    damage(run)
    Writing(run, "good", [0.5] * 6).whole()
    judge(run)
    assert run.field("bad", "verdict") == b"dead"
    assert verdict(run, "good").keep == 6
    assert run.pending("scores") == 0


@pytest.mark.parametrize("fields", [{"what": "?"}, {"rid": ""}, {"rid": "a b"}, {"rid": b"\xff"}, {"rid": "x" * 41}])
def test_a_notice_that_names_no_rollout_is_given_up(run: Run, fields: dict[str, Any]) -> None:
    run.client.xadd(run.key("scores"), fields)
    Writing(run, "good", [0.5] * 6).whole()
    judge(run)
    assert len(run.client.xrange(run.key("dead"))) == 1
    assert run.pending("scores") == 0
    assert verdict(run, "good").keep == 6


def test_notices_of_rollouts_that_are_judged_or_booked_are_acknowledged(run: Run) -> None:
    """A verdict may be given, and even booked, before the arbiter reads the last notices of its scores."""
    Writing(run, "r1", [0.5] * 6).whole()
    judge(run)
    run.client.xadd(run.key("scores"), {"rid": "r1"})
    run.client.xadd(run.key("scores"), {"rid": "booked"})
    Writing(run, "r2", [0.5] * 6).whole()
    judge(run)
    assert run.entries("scores") == []
    assert verdict(run, "r2").keep == 6
    assert [one["rid"] for one in run.entries("finished") if one["kind"] == "verdict"] == ["r1", "r2"]


def test_the_arbiter_returns_when_the_run_has_ended_or_when_it_is_stopped(run: Run) -> None:
    stop = threading.Event()
    one = Arbiter(run.config, run.plane, stop)
    thread = threading.Thread(target=one.run)
    thread.start()
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    assert run.client.exists(run.key("lease:arbiter")) == 0
    run.lease("feeder").advance("state", "ended")
    arbiter(run).run()


# --- a policy that fails ---


class Killed(BaseException):
    """Where the process would have ended."""


def failing(monkeypatch: pytest.MonkeyPatch, at: float, error: BaseException) -> None:
    """Make the policy raise at a divergence of `at`."""
    feed = Kat.feed

    def fail(self: Kat, divergence: Any) -> Cut | None:
        if at in divergence:
            raise error
        return feed(self, divergence)

    monkeypatch.setattr(Kat, "feed", fail)


def dead(run: Run) -> list[tuple[str, str]]:
    return [(entry["rid"], entry["reason"]) for entry in run.entries("dead")]


def test_a_rollout_that_the_policy_fails_on_dies_naming_it_and_the_rest_is_judged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 0.125, ZeroDivisionError("float division\nby zero"))
    Writing(run, "bad", [0.5] * 5 + [0.125]).whole()
    Writing(run, "good", [0.5] * 6).whole()
    judge(run)
    assert verdict(run, "good").keep == 6
    assert dead(run) == [("bad", "policy kat: ZeroDivisionError: float division by zero")]
    assert run.field("bad", "attempts") == b"3"
    assert [one["rid"] for one in run.entries("finished") if one["kind"] == "ending"] == ["bad"]
    assert run.pending("scores") == 0


def test_a_policy_that_fails_on_all_ends_the_arbiter_before_one_is_dead(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 0.5, KeyError("head"))
    for number in range(5):
        Writing(run, f"r{number}", [0.5] * 6).whole()
    with pytest.raises(PolicyBroken, match="policy kat: KeyError: 'head'; on 5 rollouts, and no verdict between them"):
        judge(run)
    assert dead(run) == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_rollout_that_kills_its_arbiters_dies_and_the_others_keep_their_verdicts(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    run = begin(deterministic=deterministic)
    failing(monkeypatch, 0.125, Killed())
    rids = [rid_of(number) for number in range(6)]
    for number, rid in enumerate(rids):
        values = [0.5] * 5 + [0.125 if number == 3 else 0.5]
        Writing(run, rid, values, step=0 if deterministic else None).whole()
    killed = 0
    while True:
        run.client.delete(run.key("lease:arbiter"))
        try:
            judge(run)
            break
        except Killed:
            killed += 1
            assert killed < 8, "it kills for ever"
    assert killed <= 1 + run.config.liveness.max_attempts
    assert dead(run) == [(rids[3], "3 arbiters ended while judging only this rollout")]
    assert [verdict(run, rid).keep for rid in rids if rid != rids[3]] == [6] * 5
    assert run.pending("scores") == 0
