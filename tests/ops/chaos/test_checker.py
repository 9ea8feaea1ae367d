"""The checker: an honest run passes, and each single thing that goes wrong is reported under its own name."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import step_line
from samples import Run, make_config, make_verdict

from actors.books import line_of, unjudged_line
from common.config import Config, Termination
from common.runfiles.records import Trace
from common.termination import kat_verdict
from common.wire.messages import row_digest
from ops.chaos.checker import Allowed, Counts, _kat, check_folder, check_redis, count_folder

WINDOW, PATIENCE, THRESHOLD, CHUNK = 4, 2, 0.5, 4
AGREED = [1.0] * 8 + [0.25] * 8  # windows of four: below 0.5 from the one that ends at 11 on
CUT_AT, CUT_TO = 12, 7
POISONED, ROLLED_BACK, LOST = "r000000010", "r000000011", "r000000012"
EXCUSED = Allowed(poisoned=frozenset({POISONED}), rolled_back=frozenset({ROLLED_BACK}))


@dataclass
class Folder:
    """A run's folder as lists of lines, to be broken in one place and written."""

    config: Config
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    trained: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)

    def line(self, number: int) -> dict[str, Any]:
        return next(one for one in self.rollouts if one["rid"] == rid_of(number))

    def trace(self, number: int) -> dict[str, Any]:
        return next(one for one in self.traces if one["rid"] == rid_of(number))

    def record(self, number: int) -> dict[str, Any]:
        return next(one for one in self.audit if one["rid"] == rid_of(number))

    def count(self) -> None:
        """Make the ledger and metrics.jsonl agree with what is booked and trained."""
        endings = Counter(line["ending"] for line in self.rollouts)
        dropped = Counter(line["reason"] for line in self.rollouts if line["ending"] == "dropped")
        self.ledger = {
            "admitted": len(self.rollouts),
            "trained": endings["trained"],
            "dropped": dict(dropped),
            "dead": endings["dead"],
            "open": 0,
        }
        self.metrics = [
            step_line(
                step["step"],
                policy_version=step["policy_version"],
                trajectories=len(step["rids"]),
                tokens_trained=sum(step["tokens"]),
            )
            for step in self.trained
        ]

    def write(self) -> Path:
        folder = self.config.run_dir
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(self.config.to_yaml())
        (folder / "ledger.json").write_text(json.dumps(self.ledger))
        for name in ("rollouts", "traces", "trained", "metrics", "audit"):
            lines = "".join(json.dumps(line) + "\n" for line in getattr(self, name))
            (folder / f"{name}.jsonl").write_text(lines)
        return folder


def rid_of(number: int) -> str:
    return f"r{number:09d}"


def add(
    folder: Folder,
    *,
    ending: str,
    reason: str = "",
    arm: str = "treated",
    divergence: list[float] | None = None,
    threshold: float | None = THRESHOLD,
    finish: str = "eos",
    owners: tuple[tuple[str, int], ...] = (("n1", 0),),
    step: int | None = None,
    unscored: int = 0,
    staleness: int | None = 1,
) -> str:
    """One more rollout, judged as the rule says, in chunks of four; `unscored` tokens more were written."""
    rid, values = rid_of(len(folder.rollouts)), np.array(divergence or [1.0] * 10, np.float32)
    trigger, keep, minimum = kat_verdict(values, window=WINDOW, patience=PATIENCE, threshold=threshold)
    if arm == "control":
        minimum = kat_verdict(values, window=WINDOW, patience=PATIENCE, threshold=None)[2]
    cut = arm == "treated" and trigger is not None
    total = len(values)
    tokens = np.arange(total + unscored, dtype=np.int32) + len(folder.rollouts)
    verdict = make_verdict(
        rid,
        arm=arm,
        problem=len(folder.rollouts),
        finish_reason="kl_trap" if cut else finish,
        trigger=trigger or total,
        keep=total if keep is None else keep,
        train=total if keep is None else keep,
        cut=cut,
        generated=None if cut else total,
        threshold=threshold,
        min_window=minimum,
        first_version=2,
        last_version=2 if total <= CHUNK else 3,
        tokens=tokens[:total],
        divergence=values,
    )
    line = line_of(
        verdict,
        ending=ending,
        reason=reason,
        generated=len(tokens) + cut,
        staleness=staleness,
        active=True,
        correct=None,
    )
    folder.rollouts.append(asdict(line))
    folder.traces.append(Trace.of(verdict).to_json())
    folder.audit.append(audited(rid, tokens, values, owners, "" if cut else finish, threshold))
    if step is not None:
        train(folder.trained[step - 1], verdict)
    return rid


def audited(
    rid: str,
    tokens: np.ndarray,
    divergence: np.ndarray,
    owners: tuple[tuple[str, int], ...],
    finish: str,
    threshold: float | None,
) -> dict[str, Any]:
    chunks = []
    for seq, start in enumerate(range(0, len(tokens), CHUNK)):
        part = tokens[start : start + CHUNK]
        scores = divergence[start : start + CHUNK]
        chunks.append(
            {
                "seq": seq,
                "start": start,
                "n": len(part),
                "version": 2 if seq == 0 else 3,
                "writer": [nonce for nonce, first in owners if first <= seq][-1],
                "finish": finish if finish and start + CHUNK >= len(tokens) else None,
                "tokens": row_digest(part),
                "divergence": row_digest(scores) if len(scores) else None,
            }
        )
    stored = "inactive" if threshold is None else repr(threshold)
    return {"rid": rid, "owners": [list(one) for one in owners], "chunks": chunks, "threshold": stored, "verdict": True}


def train(step: dict[str, Any], verdict: Any) -> None:
    step["rids"].append(verdict.rid)
    step["tokens"].append(verdict.train)
    step["digests"].append(row_digest(verdict.tokens[: verdict.train]))


@pytest.fixture
def honest(tmp_path: Path) -> Folder:
    """Twelve rollouts with every ending; one was poisoned and one trained in a step whose checkpoint was torn."""
    folder = Folder(make_config(tmp_path, learner={"batch_size": 2, "max_staleness": 4}))
    folder.trained = [{"step": n, "policy_version": n + 1, "rids": [], "tokens": [], "digests": []} for n in (1, 2, 3)]
    add(folder, ending="trained", threshold=None, divergence=AGREED, step=1)
    add(folder, ending="trained", divergence=AGREED, step=1, unscored=3)
    add(folder, ending="trained", arm="control", divergence=AGREED, finish="length", step=2)
    add(folder, ending="trained", arm="control", step=2)
    add(folder, ending="trained", owners=(("n1", 0), ("n2", 1), ("n3", 1), ("n4", 2)), step=3)
    add(folder, ending="trained", divergence=[1.0, 1.0], step=3)
    add(folder, ending="dropped", reason="empty", divergence=[0.25] * 8, staleness=None)
    add(folder, ending="dropped", reason="stale", staleness=5)
    add(folder, ending="dropped", reason="run_end", divergence=AGREED, staleness=None)
    writing = unjudged_line(rid_of(9), "treated", 9, ending="dropped", reason="run_end", generated=6)
    folder.rollouts.append(asdict(writing))
    folder.audit.append(audited(rid_of(9), np.arange(6), np.ones(4, np.float32), (("n1", 0),), "", None))
    dead = unjudged_line(POISONED, "treated", 10, ending="dead", reason="teacher", generated=4)
    folder.rollouts.append(asdict(dead))
    broken = audited(POISONED, np.arange(4), np.ones(0, np.float32), (("n1", 0),), "", None)
    folder.audit.append(broken | {"chunks": [{"seq": 0, "broken": "not msgpack"}], "verdict": False})
    assert add(folder, ending="trained", divergence=AGREED) == ROLLED_BACK
    folder.count()
    return folder


def names(folder: Folder, allowed: Allowed = EXCUSED) -> set[str]:
    return {violation.statement for violation in check_folder(folder.write(), allowed)}


def test_an_honest_run_passes(honest: Folder) -> None:
    assert honest.line(1)["finish_reason"] == "kl_trap"
    assert (honest.trace(1)["trigger"], honest.trace(1)["keep"]) == (CUT_AT, CUT_TO)
    assert check_folder(honest.write(), EXCUSED) == []
    assert count_folder(honest.config.run_dir) == Counts(
        rollouts=12, trained=7, dropped={"empty": 1, "run_end": 2, "stale": 1}, dead=1, cut=4, steps=3
    )


def test_files_that_a_crash_leaves_are_honest(honest: Folder) -> None:
    """A torn last line, a trace and an audit twice, a trace and an audit without their line."""
    honest.traces += [copy.deepcopy(honest.trace(3)), honest.trace(4) | {"rid": rid_of(77)}]
    honest.audit += [copy.deepcopy(honest.record(3)), honest.record(4) | {"rid": rid_of(77)}]
    folder = honest.write()
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text() + '{"rid": "r00000')
    assert check_folder(folder, EXCUSED) == []


def test_without_audit_and_without_traces_the_rest_is_checked(honest: Folder) -> None:
    folder = honest.write()
    (folder / "audit.jsonl").unlink()
    assert check_folder(folder, EXCUSED) == []
    (folder / "traces.jsonl").unlink()
    assert {violation.statement for violation in check_folder(folder, EXCUSED)} == {"record", "verdict_replayed"}
    (folder / "config.yaml").write_text(make_config(folder.parent, feeder={"record_traces": False}).to_yaml())
    assert check_folder(folder, EXCUSED) == []


# --- each statement, broken in one place ---


def booked_twice(folder: Folder) -> None:
    folder.rollouts.append(copy.deepcopy(folder.line(3)))


def never_booked(folder: Folder) -> None:
    folder.rollouts.remove(folder.line(9))


def booked_and_not_admitted(folder: Folder) -> None:
    folder.rollouts.append(folder.line(9) | {"rid": rid_of(40)})
    folder.count()


def open_in_the_ledger(folder: Folder) -> None:
    folder.ledger["open"] = 1


def miscounted(folder: Folder) -> None:
    folder.ledger["dropped"]["stale"] += 1


def trained_in_two_steps(folder: Folder) -> None:
    for name in ("rids", "tokens", "digests"):
        folder.trained[2][name].append(folder.trained[0][name][0])
    folder.count()


def trained_twice_in_a_step(folder: Folder) -> None:
    for name in ("rids", "tokens", "digests"):
        folder.trained[0][name].append(folder.trained[0][name][0])
    folder.count()


def a_step_is_missing(folder: Folder) -> None:
    folder.trained[2]["step"] = 4
    folder.count()


def metrics_have_another_step(folder: Folder) -> None:
    del folder.metrics[2]


def metrics_count_other_tokens(folder: Folder) -> None:
    folder.metrics[1]["tokens_trained"] += 1


def the_version_falls(folder: Folder) -> None:
    folder.trained[2]["policy_version"] = 2
    folder.count()


def trained_and_booked_as_stale(folder: Folder) -> None:
    folder.line(3).update(ending="dropped", reason="stale", staleness=5, tokens_trained=0)
    folder.count()


def booked_and_not_trained(folder: Folder) -> None:
    for name in ("rids", "tokens", "digests"):
        del folder.trained[1][name][0]
    folder.count()


def one_token_more_than_the_verdict(folder: Folder) -> None:
    folder.trained[0]["tokens"][1] += 1
    folder.count()


def other_tokens_than_the_verdict(folder: Folder) -> None:
    folder.trained[0]["digests"][1] = folder.trained[0]["digests"][0]


def the_verdict_trains_what_it_does_not_keep(folder: Folder) -> None:
    tokens = np.arange(CUT_TO + 1, dtype=np.int32) + 1
    folder.trace(1)["train"] = folder.line(1)["tokens_trained"] = folder.trained[0]["tokens"][1] = CUT_TO + 1
    folder.trained[0]["digests"][1] = row_digest(tokens)
    folder.count()


def a_control_rollout_trained_whole(folder: Folder) -> None:
    whole = np.arange(16, dtype=np.int32) + 2
    folder.trace(2)["train"] = folder.line(2)["tokens_trained"] = folder.trained[1]["tokens"][0] = len(whole)
    folder.trained[1]["digests"][0] = row_digest(whole)
    folder.count()


def tokens_that_nobody_accounts_for(folder: Folder) -> None:
    folder.line(1)["tokens_generated"] += 1


def other_tokens_trained_in_the_books(folder: Folder) -> None:
    folder.line(1)["tokens_trained"] -= 1


def other_tokens_to_train_on_in_the_books(folder: Folder) -> None:
    folder.line(7)["tokens_trainable"] -= 1  # dropped as stale


def dropped_and_trained_in_the_books(folder: Folder) -> None:
    folder.line(9)["tokens_trained"] = 6


def a_later_cut(folder: Folder) -> None:
    """One token more is kept, and all the rest is made to agree."""
    folder.trace(1).update(keep=CUT_TO + 1, train=CUT_TO + 1)
    line = folder.line(1)
    line.update(dict.fromkeys(("tokens_kept", "tokens_trained", "tokens_trainable"), CUT_TO + 1))
    line["tokens_detection"] -= 1
    folder.trained[0]["tokens"][1] = CUT_TO + 1
    folder.trained[0]["digests"][1] = row_digest(np.arange(CUT_TO + 1, dtype=np.int32) + 1)
    folder.count()


def another_threshold_throughout(folder: Folder) -> None:
    folder.trace(1)["threshold"] = folder.line(1)["threshold"] = 0.125
    folder.record(1)["threshold"] = "0.125"


def another_threshold_in_the_record(folder: Folder) -> None:
    folder.record(1)["threshold"] = "0.4375"


def no_number_for_a_threshold(folder: Folder) -> None:
    folder.record(1)["threshold"] = "half"


def no_threshold_in_the_record(folder: Folder) -> None:
    folder.record(1)["threshold"] = "inactive"


def a_control_rollout_cut(folder: Folder) -> None:
    folder.trace(2)["cut"] = True


def another_reason(folder: Folder) -> None:
    folder.trace(1)["finish_reason"] = folder.line(1)["finish_reason"] = "fixed"


def another_reason_in_the_books(folder: Folder) -> None:
    folder.line(1)["finish_reason"] = "eos"


def another_minimum(folder: Folder) -> None:
    folder.line(1)["min_window"] += 1e-6


def two_verdicts(folder: Folder) -> None:
    folder.traces.append(folder.trace(9 - 1) | {"threshold": 0.4375})


def no_trace(folder: Folder) -> None:
    folder.traces.remove(folder.trace(7))


def no_verdict_in_the_record(folder: Folder) -> None:
    folder.record(7)["verdict"] = False


def other_tokens_stored(folder: Folder) -> None:
    folder.record(3)["chunks"][1]["tokens"] = "00" * 8


def other_divergences_stored(folder: Folder) -> None:
    folder.record(3)["chunks"][1]["divergence"] = "00" * 8


def judged_without_a_score(folder: Folder) -> None:
    folder.record(3)["chunks"][1]["divergence"] = None


def a_gap_between_chunks(folder: Folder) -> None:
    folder.record(3)["chunks"][1]["start"] += 1


def a_chunk_is_missing(folder: Folder) -> None:
    del folder.record(3)["chunks"][1]


def the_last_chunk_is_missing(folder: Folder) -> None:
    del folder.record(3)["chunks"][-1]


def more_stored_than_generated(folder: Folder) -> None:
    folder.line(9).update(tokens_generated=4, tokens_kept=4)


def a_version_that_nobody_booked(folder: Folder) -> None:
    folder.record(3)["chunks"][1]["version"] = 4


def ended_otherwise(folder: Folder) -> None:
    folder.record(3)["chunks"][-1]["finish"] = "length"


def ended_in_the_middle(folder: Folder) -> None:
    folder.record(9)["chunks"][0]["finish"] = "eos"


def a_broken_chunk(folder: Folder) -> None:
    folder.record(7)["chunks"][1] = {"seq": 1, "broken": "not msgpack"}


def trained_without_a_record(folder: Folder) -> None:
    folder.audit.remove(folder.record(5))


def a_former_owner_wrote(folder: Folder) -> None:
    folder.record(4)["chunks"][2]["writer"] = "n1"


def a_later_owner_wrote(folder: Folder) -> None:
    folder.record(4)["chunks"][0]["writer"] = "n2"


def an_owner_between_two_takes_wrote(folder: Folder) -> None:
    folder.record(4)["chunks"][1]["writer"] = "n2"


def nobody_owned(folder: Folder) -> None:
    folder.record(4)["owners"] = []


def owners_out_of_order(folder: Folder) -> None:
    folder.record(4)["owners"][1:3] = [["n2", 2], ["n3", 1]]


def dropped_for_no_reason(folder: Folder) -> None:
    folder.line(9)["reason"] = "why"
    folder.count()


def lost_with_redis_alive(folder: Folder) -> None:
    folder.line(9)["reason"] = "lost"
    folder.count()


def dropped_as_stale_and_fresh(folder: Folder) -> None:
    folder.line(7)["staleness"] = 4


def trained_and_stale(folder: Folder) -> None:
    folder.line(3)["staleness"] = 5


def dropped_as_empty_and_full(folder: Folder) -> None:
    folder.line(7)["reason"] = "empty"
    folder.count()


def dead_and_not_poisoned(folder: Folder) -> None:
    folder.line(9).update(ending="dead", reason="rollout")
    folder.count()


def ended_as_something_else(folder: Folder) -> None:
    folder.line(9).update(ending="dropped", reason="")
    folder.count()


BREAKS: dict[str, list[Callable[[Folder], None]]] = {
    "ended_once": [booked_twice, never_booked, booked_and_not_admitted, open_in_the_ledger, miscounted],
    "trained_once": [
        trained_in_two_steps,
        trained_twice_in_a_step,
        a_step_is_missing,
        metrics_have_another_step,
        metrics_count_other_tokens,
        the_version_falls,
    ],
    "booked_as_trained": [trained_and_booked_as_stale, booked_and_not_trained],
    "within_verdict": [
        one_token_more_than_the_verdict,
        other_tokens_than_the_verdict,
        the_verdict_trains_what_it_does_not_keep,
        a_control_rollout_trained_whole,
        tokens_that_nobody_accounts_for,
        other_tokens_trained_in_the_books,
        other_tokens_to_train_on_in_the_books,
        dropped_and_trained_in_the_books,
    ],
    "verdict_replayed": [
        a_later_cut,
        another_threshold_throughout,
        another_threshold_in_the_record,
        no_number_for_a_threshold,
        no_threshold_in_the_record,
        a_control_rollout_cut,
        another_reason,
        another_reason_in_the_books,
        another_minimum,
        two_verdicts,
        no_trace,
        no_verdict_in_the_record,
    ],
    "tokens_as_generated": [
        other_tokens_stored,
        other_divergences_stored,
        judged_without_a_score,
        a_gap_between_chunks,
        a_chunk_is_missing,
        the_last_chunk_is_missing,
        more_stored_than_generated,
        a_version_that_nobody_booked,
        ended_otherwise,
        ended_in_the_middle,
        a_broken_chunk,
        trained_without_a_record,
    ],
    "owners_only": [
        a_former_owner_wrote,
        a_later_owner_wrote,
        an_owner_between_two_takes_wrote,
        nobody_owned,
        owners_out_of_order,
    ],
    "dropped_with_cause": [
        dropped_for_no_reason,
        lost_with_redis_alive,
        dropped_as_stale_and_fresh,
        trained_and_stale,
        dropped_as_empty_and_full,
        dead_and_not_poisoned,
        ended_as_something_else,
    ],
}


@pytest.mark.parametrize(
    ("statement", "spoil"),
    [(statement, spoil) for statement, spoils in BREAKS.items() for spoil in spoils],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_is_broken_is_reported_as_that_and_nothing_else(
    honest: Folder, statement: str, spoil: Callable[[Folder], None]
) -> None:
    spoil(honest)
    assert names(honest) == {statement}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: folder.rollouts.append({"rid": 7}),
        lambda folder: folder.rollouts.append([]),
        lambda folder: folder.rollouts.append(folder.line(3) | {"tokens_kept": None}),
        lambda folder: folder.traces.append(folder.trace(3) | {"tokens": "AAAA"}),
        lambda folder: folder.traces.append(folder.trace(3) | {"divergence": "?"}),
        lambda folder: folder.traces.append(folder.trace(3) | {"tokens": "", "divergence": ""}),
        lambda folder: folder.traces.append(folder.trace(3) | {"arm": "other"}),
        lambda folder: folder.trained.append(folder.trained[0] | {"rids": ["r000000099"]}),
        lambda folder: folder.trained.append(folder.trained[0] | {"tokens": None}),
        lambda folder: folder.metrics.append({"step": "four"}),
        lambda folder: folder.audit.append({"rid": rid_of(3)}),
        lambda folder: folder.audit.append(folder.record(3) | {"owners": [["n1"]]}),
        lambda folder: folder.audit.append(folder.record(3) | {"chunks": [None]}),
    ],
)
def test_a_line_that_cannot_be_read_is_reported(honest: Folder, spoil: Callable[[Folder], None]) -> None:
    spoil(honest)
    found = check_folder(honest.write(), EXCUSED)
    assert [violation.statement for violation in found] == ["record"]
    assert ".jsonl:" in found[0].detail


@pytest.mark.parametrize("name", ["config.yaml", "ledger.json", "rollouts.jsonl", "trained.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"\xff\x00{", b"[1, 2]\n", b'{"dropped": []}\n'])
def test_a_file_that_is_missing_or_broken_is_reported(honest: Folder, name: str, content: bytes | None) -> None:
    path = honest.write() / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content + b"\n")
    found = check_folder(path.parent, EXCUSED)
    assert any(violation.statement == "record" and name in violation.detail for violation in found)


# --- excuses ---


def test_a_fault_excuses_what_it_costs_and_nothing_else(honest: Folder) -> None:
    assert names(honest, Allowed(rolled_back=EXCUSED.rolled_back)) == {"dropped_with_cause", "tokens_as_generated"}
    assert names(honest, Allowed(poisoned=EXCUSED.poisoned)) == {"booked_as_trained"}


def test_a_lost_redis_excuses_what_it_took(honest: Folder) -> None:
    """One rollout lost while it was written, one after a checkpoint that its booking did not survive."""
    lost = unjudged_line(LOST, "treated", 12, ending="dropped", reason="lost", generated=0)
    honest.rollouts.append(asdict(lost))
    honest.rollouts.append(asdict(lost) | {"rid": rid_of(13), "problem": 13})
    honest.trained.append(
        {"step": 4, "policy_version": 9, "rids": [rid_of(13)], "tokens": [5], "digests": ["00" * 8]},
    )
    honest.audit.remove(honest.record(5))
    honest.count()
    open_then = frozenset({LOST, rid_of(13), rid_of(5)})
    lossy = replace(EXCUSED, lost=open_then)
    assert check_folder(honest.write(), lossy) == []
    for rid, statements in (
        (LOST, {"dropped_with_cause"}),
        (rid_of(13), {"dropped_with_cause", "booked_as_trained"}),
        (rid_of(5), {"tokens_as_generated"}),
    ):
        assert names(honest, replace(EXCUSED, lost=open_then - {rid})) == statements
    assert names(honest) == {"dropped_with_cause", "booked_as_trained", "tokens_as_generated"}
    honest.line(13).update(reason="run_end")
    honest.count()
    assert names(honest, lossy) == {"booked_as_trained"}


def test_what_was_admitted_before_the_calm_must_have_ended_by_itself(honest: Folder) -> None:
    for cursor, statements in ((8, set()), (9, {"dropped_with_cause"})):
        calm = Allowed(poisoned=EXCUSED.poisoned, rolled_back=EXCUSED.rolled_back, calm_cursor=cursor)
        assert names(honest, calm) == statements


def test_a_poisoned_record_need_not_hold_what_was_judged(honest: Folder) -> None:
    other_tokens_stored(honest)
    a_former_owner_wrote(honest)
    no_number_for_a_threshold(honest)
    spoiled = {rid_of(number) for number in (1, 3, 4)}
    assert names(honest) == {"tokens_as_generated", "owners_only", "verdict_replayed"}
    assert names(honest, Allowed(EXCUSED.poisoned | spoiled, rolled_back=EXCUSED.rolled_back)) == set()


def test_a_deterministic_run_trains_what_is_late_and_drops_nothing_for_it(honest: Folder) -> None:
    honest.line(3)["staleness"] = 900
    assert names(honest) == {"dropped_with_cause"}
    honest.config = honest.config.model_copy(update={"deterministic": True})
    late, dropped = check_folder(honest.write(), EXCUSED), honest.line(7)
    assert [(one.statement, one.rid) for one in late] == [("dropped_with_cause", dropped["rid"])]
    assert "dropped as stale" in late[0].detail
    dropped.update(reason="run_end", staleness=None)
    honest.count()
    assert names(honest) == set()


# --- the rule ---


def settings(**changes: Any) -> Termination:
    return Termination(**{"window": 4, "patience": 2, "min_calibration": 4, "buffer_size": 16} | changes)


@given(
    divergence=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1e-30, 3.0]), min_size=1, max_size=60),
    window=st.integers(1, 9),
    patience=st.integers(1, 4),
    stride=st.integers(1, 5),
    grace_tokens=st.integers(0, 9),
    threshold=st.sampled_from([None, 0.0, 0.25, 0.5, 0.6, 1e-30]),
)
def test_windows_by_numpy_are_the_rule_ties_included(
    divergence: list[float], window: int, patience: int, stride: int, grace_tokens: int, threshold: float | None
) -> None:
    rule = {"window": window, "patience": patience, "stride": stride, "grace_tokens": grace_tokens}
    trigger, keep, minimum = kat_verdict(divergence, threshold=threshold, **rule)
    *found, doubt = _kat(np.array(divergence, np.float32), settings(**rule), threshold)
    assert found[:2] == [trigger, keep]
    assert (found[2] is None) == (minimum is None)
    assert abs((found[2] or 0.0) - (minimum or 0.0)) <= doubt < 1e-12


def test_windows_by_numpy_are_the_rule_on_the_shared_cases() -> None:
    cases = json.loads((Path(__file__).parents[2] / "vectors" / "kat_rule.json").read_text())["cases"]
    assert len(cases) == 200
    for case in cases:
        rule = {name: case[name] for name in ("window", "patience", "stride", "grace_tokens")}
        trigger, keep, minimum, doubt = _kat(np.array(case["divergence"]), settings(**rule), case["threshold"])
        assert keep == case["keep"]
        assert (trigger is None) == (keep is None)
        assert minimum == pytest.approx(case["min_window"], abs=max(doubt, 1e-12))


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [("none", 6), ("fixed", 6), ("fixed", 16), ("own_policy:Marked", 6), ("own_policy:Marked", 16)],
)
def test_other_policies_are_replayed_too(honest: Folder, policy: str, tokens: int) -> None:
    """Rollout 1, and no other, judged by another policy on its 16 tokens."""
    config = make_config(
        Path(honest.config.runs_dir),
        # The ids are 0, 1, …: the mark cuts in front of the token after those that are kept.
        termination={"policy": policy, "fixed_tokens": tokens, "options": {"token": tokens}},
        learner={"max_staleness": 4},
    )
    folder = Folder(config)
    folder.trained = [{"step": 1, "policy_version": 1, "rids": [], "tokens": [], "digests": []}]
    add(folder, ending="trained", divergence=AGREED, threshold=None, step=1)
    folder.count()
    trigger = {"none": 99, "fixed": tokens}.get(policy, tokens + 1)
    assert names(folder) == ({"verdict_replayed"} if trigger < 16 else set())
    if trigger < 16:
        reason = policy if policy == "fixed" else "marked"
        folder.trace(0).update(trigger=trigger, keep=tokens, train=tokens, cut=True, finish_reason=reason)
        folder.line(0).update(
            finish_reason=reason,
            tokens_kept=tokens,
            tokens_trained=tokens,
            tokens_trainable=tokens,
            tokens_detection=trigger - tokens,
            tokens_overshoot=folder.line(0)["tokens_generated"] - trigger,
        )
        folder.trained[0].update(tokens=[tokens], digests=[row_digest(np.arange(tokens, dtype=np.int32))])
        folder.count()
        assert names(folder) == set()


# --- Redis ---


@pytest.fixture
def finished(run: Run) -> Run:
    """r1 trained and booked, the run ended."""
    entry = run.judged("r1")
    run.settle("r1", entry)
    book(run, "r1", "trained")
    for stream_entry, _ in run.client.xrange(run.key("finished")):
        run.client.xack(run.key("finished"), "books", stream_entry)
        run.client.xdel(run.key("finished"), stream_entry)
    run.client.set(run.key("run"), "ended")
    run.config.run_dir.mkdir(exist_ok=True)
    (run.config.run_dir / "config.yaml").write_text(run.config.to_yaml())
    return run


def book(run: Run, rid: str, ending: str, reason: str = "") -> None:
    """Book as the feeder does: a line, then the script."""
    line = unjudged_line(rid, "treated", 0, ending=ending, reason=reason, generated=0)
    run.config.run_dir.mkdir(exist_ok=True)
    with (run.config.run_dir / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(asdict(line)) + "\n")
    run.book(rid, line.ledger_field)


def left(run: Run, allowed: Allowed | None = None) -> list[tuple[str, str]]:
    found = check_redis([run.client], run.plane.run_key, run.config.run_dir, allowed)
    return [(violation.statement, violation.rid) for violation in found]


def test_a_finished_run_leaves_nothing_in_redis(finished: Run) -> None:
    assert left(finished) == []


def test_a_run_that_goes_on_is_reported(finished: Run) -> None:
    finished.client.set(finished.key("run"), "open")
    finished.admit("r2")
    finished.take()
    assert sorted(set(left(finished))) == [("drained", ""), ("drained", "r2"), ("redis_ledger", "")]


@pytest.mark.parametrize("stream", ["prompts", "scores", "trajectories", "finished", "chunks:3"])
def test_an_entry_that_is_left_is_reported_also_when_only_its_pending_mark_is(finished: Run, stream: str) -> None:
    key, group = finished.key(stream), dict(finished.plane.groups)[stream]
    entry = finished.client.xadd(key, {"rid": "r7"})
    assert left(finished) == [("drained", "r7")]
    assert left(finished, Allowed(poisoned=frozenset({"r7"}))) == []
    finished.client.xreadgroup(group, "someone", {key: ">"})
    finished.client.xdel(key, entry)
    assert left(finished) == [("drained", "")]


def test_a_hash_or_an_open_rollout_that_is_left_is_reported(finished: Run) -> None:
    finished.client.hset(finished.key("rollout:r2"), "head", "x")
    finished.client.sadd(finished.key("open"), "r3")
    assert left(finished) == [("drained", "r3"), ("drained", "r2")]


def test_another_ledger_is_reported(finished: Run) -> None:
    finished.client.hincrby(finished.key("ledger"), "trained", 1)
    assert left(finished) == [("redis_ledger", "")]


def test_a_redis_without_the_run_is_reported(finished: Run) -> None:
    finished.client.delete(*finished.client.scan_iter(finished.plane.prefix.replace("{", "[{]") + "*"))
    assert set(left(finished)) == {("drained", ""), ("redis_ledger", "")}


def test_only_what_was_broken_on_purpose_may_be_dead(finished: Run) -> None:
    finished.client.set(finished.key("run"), "open")
    finished.admit("r2")
    finished.take()
    assert finished.plane.fail("r2", "teacher", "why", max_attempts=1)
    book(finished, "r2", "dead", "teacher")
    for entry, _ in finished.client.xrange(finished.key("finished")):
        finished.client.xdel(finished.key("finished"), entry)
    finished.client.set(finished.key("run"), "ended")
    assert left(finished) == [("dead_letters", "r2")]
    poisoned = Allowed(poisoned=frozenset({"r2"}))
    assert left(finished, poisoned) == []
    finished.plane.fail("", "trajectories", "its rollout is gone", max_attempts=1, shown=b"r2")
    assert left(finished, poisoned) == []
    finished.plane.fail("", "chunks", "not a rollout id", max_attempts=1, shown=b"junk")
    assert left(finished, poisoned) == [("dead_letters", "")]
    assert left(finished, Allowed(poisoned=frozenset({"r2"}), broken_notices=1)) == []
    finished.plane.fail("", "trajectories", "r2: of a rollout it does not name", max_attempts=1, shown=b"junk")
    assert len(left(finished, Allowed(poisoned=frozenset({"r2"}), broken_notices=1))) == 1
