"""Every answer of every script, on a real Redis: who may write, what is taken off, what happens the second time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from samples import (
    Run,
    fenced,
    make_divergence,
    make_head,
    make_logprobs,
    make_score_support,
    make_verdict,
    make_view,
    script,
)

from common.wire import scripts
from common.wire.lease import Lease, LeaseLost
from common.wire.plane import Plane, RunGone, create_run, current_run
from common.wire.scripts import Look
from ops.reach.embedded import EmbeddedRedis


def idle_for(ms: int) -> int:
    """Wait until entries have been idle for more than `ms`; returns `ms`."""
    time.sleep(ms / 1000 + 0.01)
    return ms


# --- admit ---


def test_admission_puts_the_rollout_on_record_whole(run: Run) -> None:
    assert run.admit("r1") == b"ok"
    record = run.plane.rollout("r1")
    assert record[b"head"] == make_head("r1").encode()
    assert (record[b"chunks"], record[b"scored"], record[b"length"]) == (b"0", b"0", b"0")
    assert run.entries("prompts") == [{"rid": "r1"}]
    assert run.client.smembers(run.key("open")) == {b"r1"}
    assert run.client.get(run.key("cursor")) == b"1"
    assert run.ledger() == {"admitted": 1}


def test_admitting_the_same_rollout_again_changes_nothing(run: Run) -> None:
    run.admit("r1")
    before = run.plane.rollout("r1")
    assert run.admit("r1", problem=99) == b"ok"
    assert run.plane.rollout("r1") == before
    assert run.entries("prompts") == [{"rid": "r1"}]
    assert run.ledger() == {"admitted": 1}


def test_without_the_lease_nothing_is_admitted(run: Run) -> None:
    run.lease("feeder")
    assert run.plane.call(script("admit", "another token", "r1", make_head().encode(), 1)) == [b"lost"]
    assert run.client.exists(run.key("rollout:r1"), run.key("cursor")) == 0


def test_a_run_that_is_trained_admits_nothing(run: Run) -> None:
    run.lease("learner").advance("state", "trained")
    assert run.admit("r1") == b"ended"
    assert run.plane.rollout("r1") == {}


# --- look ---


def looked(run: Run, *asked: tuple[str, int]) -> list[Look]:
    return run.plane.call(scripts.look(2, asked))


def test_a_look_reads_scored_chunks_in_turn_up_to_the_first_that_is_not_scored(run: Run) -> None:
    for rid in ("r1", "r2"):
        run.admit(rid)
    run.take("w1", "n1")
    for seq in range(4):
        run.chunk("r1", "n1", seq=seq, start=3 * seq, tokens=(seq, 2, 3))
        if seq != 3:
            run.score("r1", seq=seq)
    stored = {name: run.field("r1", name) for name in ("head", "t:0", "d:0", "t:1", "d:1", "t:2", "d:2")}
    first, unwritten = looked(run, ("r1", 0), ("r2", 0))
    assert first.scored == [stored["t:0"], stored["d:0"], stored["t:1"], stored["d:1"]]  # two, as asked
    assert (first.head, first.judged, first.threshold, first.finish) == (stored["head"], False, b"inactive", None)
    assert (first.chunks, first.length) == (b"4", b"12")
    assert (unwritten.head, unwritten.threshold, unwritten.scored) == (run.field("r2", "head"), None, [])
    [further] = looked(run, ("r1", 2))
    assert (further.head, further.scored) == (True, [stored["t:2"], stored["d:2"]])


def test_a_look_reads_views_where_they_are_read(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    for seq in range(2):
        run.chunk("r1", "n1", seq=seq, start=3 * seq)
    view = make_view(seq=1).encode()
    run.score("r1", seq=0)
    shard, entry = run.plane.shard_of("r1"), run.notice("r1", 1)
    assert run.raw(scripts.score(shard, entry, "r1", 1, make_divergence(seq=1).encode(), b"q", view)) == [b"ok"]
    assert (run.field("r1", "v:0"), run.field("r1", "v:1")) == (None, view)
    stored = {name: run.field("r1", name) for name in ("t:0", "d:0", "t:1", "d:1")}
    [look] = run.plane.call(scripts.look(2, [("r1", 0)], views=True))
    assert look.scored == [stored["t:0"], stored["d:0"], b"", stored["t:1"], stored["d:1"], view]
    [look] = looked(run, ("r1", 0))
    assert look.scored == list(stored.values())


def test_a_look_says_what_has_a_verdict_and_what_is_gone(run: Run) -> None:
    run.judged("r1")
    over, gone = looked(run, ("r1", 0), ("r7", 0))
    assert (over.judged, gone.judged, gone.head) == (True, False, None)


# --- take ---


def test_a_fresh_rollout_is_taken_with_a_nonce_as_owner(run: Run) -> None:
    run.admit("r1")
    [[rid, entry, chunks, length, claims]] = run.take("w1", "n1")
    assert (rid, chunks, length, claims) == (b"r1", b"0", b"0", 0)
    assert entry == run.field("r1", "entry")
    assert (run.field("r1", "owner"), run.field("r1", "worker")) == (b"n1", b"w1")
    assert run.take("w2", "n2") == []


def test_no_more_is_taken_than_was_asked_for(run: Run) -> None:
    for rid in ("r1", "r2", "r3"):
        run.admit(rid)
    assert [taken[0] for taken in run.take(count=2)] == [b"r1", b"r2"]
    assert [taken[0] for taken in run.take(count=2)] == [b"r3"]


def test_an_idle_rollout_is_claimed_and_every_claim_is_counted(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.chunk("r1", "n1", tokens=(4, 5))
    for number, nonce in enumerate(("n2", "n3"), start=1):
        [[rid, _, chunks, length, claims]] = run.take("w2", nonce, idle_ms=idle_for(30))
        assert (rid, chunks, length, claims) == (b"r1", b"1", b"2", number)
        assert run.field("r1", "owner") == nonce.encode()
    # Progress clears the count.
    assert run.chunk("r1", "n3", seq=1, start=2) == [b"ok", b"0"]
    assert run.take("w1", "n4", idle_ms=idle_for(30))[0][4] == 1


def test_a_busy_rollout_is_not_claimed(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    assert run.take("w2", "n2", idle_ms=60_000) == []
    assert run.field("r1", "owner") == b"n1"


def test_idle_rollouts_come_before_fresh_ones_and_share_the_count(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.admit("r2")
    run.admit("r3")
    taken = run.take("w2", "n2", count=2, idle_ms=idle_for(30))
    assert [one[0] for one in taken] == [b"r1", b"r2"]


def test_a_released_rollout_is_claimed_at_once_and_not_counted_as_a_claim(run: Run) -> None:
    run.admit("r1")
    [[_, entry, *_]] = run.take("w1", "n1")
    assert run.plane.call(script("release", "w1", "r1", entry, "n1")) == [b"ok"]
    assert run.field("r1", "owner") is None
    [[rid, *_, claims]] = run.take("w2", "n2", idle_ms=60_000)
    assert (rid, claims) == (b"r1", 0)


def test_only_the_owner_can_release(run: Run) -> None:
    run.admit("r1")
    [[_, entry, *_]] = run.take("w1", "n1")
    run.plane.call(script("release", "w2", "r1", entry, "n2"))
    assert run.field("r1", "owner") == b"n1"
    assert run.take("w3", "n3", idle_ms=60_000) == []


@pytest.mark.parametrize("how", ["verdict", "gone"])
def test_entries_of_rollouts_that_are_over_are_taken_off(run: Run, how: str) -> None:
    run.admit("r1")
    if how == "verdict":
        run.client.hset(run.key("rollout:r1"), "verdict", "any")
    else:
        run.client.delete(run.key("rollout:r1"))
    assert run.take() == []
    assert run.entries("prompts") == []
    assert run.pending("prompts") == 0


def test_a_malformed_entry_is_handed_out_without_a_rollout_id(run: Run) -> None:
    entry = run.client.xadd(run.key("prompts"), {"who": "knows"})
    run.admit("r1")
    malformed, good = run.take()
    assert malformed[:2] == [None, entry]
    assert good[0] == b"r1"
    assert run.plane.fail("", "rollout", "no id", max_attempts=1, at=("prompts", "rollout", entry))
    assert run.entries("prompts") == [{"rid": "r1"}]


def test_nothing_is_taken_once_the_run_is_trained(run: Run) -> None:
    run.admit("r1")
    run.lease("learner").advance("state", "trained")
    assert run.take() == [b"ended"]


@pytest.mark.parametrize("value", ["many", "007", "-1x", str(1 << 63), ""])
def test_a_count_of_claims_that_is_no_number_is_handed_out_as_none(run: Run, value: str) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.client.hset(run.key("rollout:r1"), "claims", value)
    [[rid, entry, chunks, _, claims]] = run.take("w2", "n2", idle_ms=idle_for(30))
    assert (rid, chunks, claims) == (b"r1", b"0", None)
    assert run.field("r1", "owner") == b"n2"
    assert run.plane.call(script("release", "w2", "r1", entry, "n2")) == [b"ok"]
    assert not run.plane.fail("r1", "rollout", "claims", max_attempts=3)
    assert run.field("r1", "attempts") == b"1"


@pytest.mark.parametrize("field", ["chunks", "length"])
@pytest.mark.parametrize("value", [None, "many"])
def test_a_count_that_is_no_number_or_missing_is_handed_out_as_it_is(run: Run, field: str, value: str | None) -> None:
    run.admit("r1")
    name = run.key("rollout:r1")
    run.client.hset(name, field, value) if value else run.client.hdel(name, field)
    [[rid, _, *counts, claims]] = run.take()
    assert (rid, claims) == (b"r1", 0)
    assert counts[["chunks", "length"].index(field)] == (value.encode() if value else None)


# --- beat ---


def test_a_heartbeat_answers_the_scored_chunks_and_keeps_the_entry_from_being_claimed(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.chunk("r1", "n1")
    assert run.beat("r1", "n1") == b"0"
    run.score("r1")
    time.sleep(0.06)
    assert run.beat("r1", "n1") == b"1"
    assert run.take("w2", "n2", idle_ms=50) == []


def test_a_former_owners_heartbeat_is_refused_and_does_not_steal_the_entry_back(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.take("w2", "n2", idle_ms=idle_for(30))
    assert run.beat("r1", "n1", "w1") == b"lost"
    [pending] = run.client.xpending_range(run.key("prompts"), "rollout", "-", "+", 10)
    assert pending["consumer"] == b"w2"


def test_a_heartbeat_says_that_the_rollout_or_the_run_has_ended(run: Run) -> None:
    run.judged("r1")
    assert run.beat("r1", "n1") == b"ended"
    run.admit("r2")
    run.take("w1", "n2")
    assert run.beat("r2", "n2") == b"0"
    run.lease("learner").advance("state", "trained")
    assert run.beat("r2", "n2") == b"ended"


def test_a_heartbeat_of_a_rollout_that_is_gone_is_refused(run: Run) -> None:
    assert run.beat("nobody", "n1") == b"lost"


# --- chunk ---


def test_a_chunk_and_its_notice_are_stored_together(run: Run) -> None:
    run.admit("r1")
    run.take()
    assert run.chunk(tokens=(4, 5)) == [b"ok", b"0"]
    assert (run.field("r1", "chunks"), run.field("r1", "length")) == (b"1", b"2")
    assert run.entries(f"chunks:{run.plane.shard_of('r1')}") == [{"rid": "r1", "seq": "0"}]
    assert run.field("r1", "finish") is None
    assert run.pending("prompts") == 1


def test_the_final_chunk_takes_the_prompt_off(run: Run) -> None:
    run.admit("r1")
    run.take()
    assert run.chunk(finish="length") == [b"ok", b"0"]
    assert run.field("r1", "finish") == b"length"
    assert (run.entries("prompts"), run.pending("prompts")) == ([], 0)


def test_the_same_chunk_again_is_a_success_without_effect(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk(tokens=(4, 5))
    before = run.plane.rollout("r1")
    assert run.chunk(tokens=(4, 5)) == [b"ok", b"0"]
    assert run.plane.rollout("r1") == before
    assert len(run.entries(f"chunks:{run.plane.shard_of('r1')}")) == 1


def test_another_chunk_in_the_same_place_is_refused(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk(tokens=(4, 5))
    assert run.chunk(tokens=(4, 6)) == [b"lost"]
    assert run.field("r1", "length") == b"2"


def test_a_chunk_ahead_of_its_place_is_refused(run: Run) -> None:
    run.admit("r1")
    run.take()
    assert run.chunk(seq=1, start=3) == [b"lost"]
    assert run.field("r1", "chunks") == b"0"


@pytest.mark.parametrize("value", [None, "many", "1x", "nan", "0x1", ""])
def test_a_chunk_of_a_record_that_does_not_count_its_chunks_is_refused(run: Run, value: str | None) -> None:
    run.admit("r1")
    run.take()
    assert run.chunk("r1") == [b"ok", b"0"]
    name = run.key("rollout:r1")
    run.client.hset(name, "chunks", value) if value is not None else run.client.hdel(name, "chunks")
    before = run.plane.rollout("r1")
    for seq in (0, 1):
        assert run.chunk("r1", seq=seq, start=3 * seq) == [b"lost"]
    assert run.plane.rollout("r1") == before


def test_a_former_owners_chunk_is_refused_even_if_it_is_the_one_stored(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.chunk("r1", "n1")
    run.take("w2", "n2", idle_ms=idle_for(30))
    assert run.chunk("r1", "n1") == [b"lost"]
    assert run.chunk("r1", "n1", seq=1, start=3) == [b"lost"]
    assert run.chunk("r1", "n2", seq=1, start=3) == [b"ok", b"0"]


def test_a_chunk_behind_the_verdict_or_of_a_run_that_is_over_is_told_so(run: Run) -> None:
    run.judged("r1")
    assert run.chunk(seq=1, start=3) == [b"ended"]
    run.admit("r2")
    run.take()
    run.lease("learner").advance("state", "trained")
    assert run.chunk("r2") == [b"ended"]
    assert run.field("r2", "chunks") == b"0"


def test_a_chunk_of_a_rollout_that_is_gone_is_refused(run: Run) -> None:
    assert run.chunk("nobody") == [b"lost"]
    assert run.client.exists(run.key("rollout:nobody")) == 0


# --- count ---


def test_the_owners_count_reaches_the_books_and_nobody_elses(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    assert run.plane.call(script("count", "r1", "n0", 9)) == [b"lost"]
    assert run.entries("finished") == []
    assert run.plane.call(script("count", "r1", "n1", 9)) == [b"ok"]
    assert run.entries("finished") == [{"kind": "count", "rid": "r1", "generated": "9"}]


# --- tokens generated ---


def test_the_tokens_of_each_stored_chunk_count_once_in_either_arm(run: Run) -> None:
    assert run.plane.generated() == 0
    for rid, arm in (("r1", "treated"), ("r2", "control")):
        run.admit(rid, arm=arm)
    run.take()
    run.chunk("r1", tokens=(4, 5))
    assert run.plane.generated() == 2
    run.chunk("r1", seq=1, start=2, tokens=(6, 7, 8))
    run.chunk("r2", tokens=(4,), finish="eos")
    assert run.plane.generated() == 6
    run.chunk("r1", seq=1, start=2, tokens=(6, 7, 8))  # the answer was lost: sent again
    assert run.plane.generated() == 6
    assert run.plane.policy() == {"generated": "6"}


def test_what_a_former_owner_sends_counts_nothing_and_the_next_one_goes_on_behind_what_is_stored(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.chunk("r1", "n1")
    run.take("w2", "n2", idle_ms=idle_for(30))
    assert run.chunk("r1", "n1", seq=1, start=3) == [b"lost"]
    assert run.plane.generated() == 3
    run.chunk("r1", "n2", seq=1, start=3, tokens=(7, 8))
    assert run.plane.generated() == 5


def test_refused_chunks_count_nothing(own_redis: EmbeddedRedis, start: Callable[..., Run]) -> None:
    run = start(own_redis)
    run.admit("r1")
    run.take()
    assert run.chunk("r1", seq=1, start=3) == [b"lost"]  # ahead of its place
    assert run.chunk("nobody") == [b"lost"]
    run.client.config_set("maxmemory", int(run.client.info("memory")["used_memory"] / 0.9))
    assert run.chunk("r1") == [b"full"]
    run.client.config_set("maxmemory", 0)
    run.judged("r2")
    assert run.chunk("r2", seq=1, start=3) == [b"ended"]
    run.lease("learner").advance("state", "trained")
    assert run.chunk("r1") == [b"ended"]
    assert run.plane.generated() == 3  # of r2


def test_what_a_writer_could_no_longer_store_counts_once_with_its_final_count(run: Run) -> None:
    run.judged("r1")  # three tokens stored
    assert run.plane.call(script("count", "r1", "n0", 9)) == [b"lost"]
    assert run.plane.generated() == 3
    for _ in range(2):  # the second time because the answer was lost
        assert run.plane.call(script("count", "r1", "n1", 9)) == [b"ok"]
        assert run.plane.generated() == 9
    run.judged("r2")
    assert run.plane.call(script("count", "r2", "n1", 3)) == [b"ok"]  # all of it was stored
    assert run.plane.generated() == 12


@pytest.mark.parametrize("length", [None, "many", "-1", "1" * 40])
def test_a_record_that_does_not_know_its_length_counts_nothing(run: Run, length: str | None) -> None:
    run.admit("r1")
    run.take()
    name = run.key("rollout:r1")
    run.client.hset(name, "length", length) if length else run.client.hdel(name, "length")
    assert run.chunk("r1")[0] == b"ok"
    run.client.hset(name, "length", "many")
    assert run.plane.call(script("count", "r1", "n1", 9)) == [b"ok"]
    assert run.plane.generated() == 0


@pytest.mark.parametrize("junk", ["many", "", "1.5", "9" * 30])
def test_a_junk_count_of_tokens_begins_anew(run: Run, junk: str) -> None:
    run.client.hset(run.key("policy"), "generated", junk)
    run.admit("r1")
    run.take()
    assert run.chunk("r1")[0] == b"ok"
    assert run.plane.generated() == 3


def test_a_restored_run_has_what_its_books_and_the_records_of_the_living_count(run: Run) -> None:
    for number in (1, 2, 3):
        run.admit(f"r{number}")
    run.take()
    run.chunk("r1", tokens=(4, 5))
    run.chunk("r2")
    run.plane.call(script("count", "r2", "n1", 9))
    run.client.hset(run.key("policy"), "generated", 1)
    restore = ("restore", 9, 100, 4, "r1", "r2", "r3", "nobody", "admitted", 9, "trained", 5)
    for _ in range(2):
        assert run.lease("feeder").call(fenced(*restore)) == [b"ok"]
        assert run.plane.generated() == 111  # 100 + 2 + 9
        run.client.set(run.key("cursor"), 4)
    assert run.ledger() == {"admitted": 9, "trained": 5}


# --- score ---


def test_the_first_score_wins_and_a_second_sends_no_notice(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    assert run.field("r1", "s:0") == make_logprobs(3).encode()
    assert run.score(values=(0.5, 0.25, 0.0)) == b"ok"
    assert run.field("r1", "s:0") is None, "the divergence is computed, and nothing else needs it"
    first = run.field("r1", "d:0")
    assert run.score(values=(0.5, 0.25, 0.125)) == b"duplicate"
    assert run.field("r1", "d:0") == first
    assert run.field("r1", "q:0") == make_score_support(3).encode()
    assert run.field("r1", "scored") == b"1"
    assert run.entries("scores") == [{"rid": "r1"}]


def test_a_score_takes_its_notice_off(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    shard = f"chunks:{run.plane.shard_of('r1')}"
    run.notice()
    assert run.pending(shard) == 1
    run.score()
    assert (run.entries(shard), run.pending(shard)) == ([], 0)


def test_the_threshold_is_fixed_by_the_first_score_and_never_changes(run: Run) -> None:
    run.admit("r1")
    run.admit("r2")
    run.take()
    run.chunk("r1")
    run.chunk("r1", seq=1, start=3)
    run.chunk("r2")
    run.score("r1")
    assert run.field("r1", "threshold") == b"inactive"
    run.client.set(run.key("threshold"), "0.125")
    run.score("r1", seq=1)
    run.score("r2")
    assert run.field("r1", "threshold") == b"inactive"
    assert run.field("r2", "threshold") == b"0.125"


def test_a_score_behind_the_verdict_is_refused_and_its_notice_taken_off(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    run.chunk(seq=1, start=3)
    run.score()
    run.verdict()
    assert run.score(seq=1) == b"ended"
    assert run.field("r1", "d:1") is None
    shard = f"chunks:{run.plane.shard_of('r1')}"
    assert (run.entries(shard), run.pending(shard), run.entries("scores")) == ([], 0, [])


def test_a_score_of_a_chunk_that_nobody_stored_is_refused(run: Run) -> None:
    run.admit("r1")
    assert run.plane.call(script("score", 0, b"1-1", "r1", 5, b"d", b"q")) == [b"ended"]
    assert run.field("r1", "d:5") is None
    assert run.field("r1", "threshold") is None


# --- verdict ---


def test_a_rollout_has_exactly_one_verdict(run: Run) -> None:
    run.judged("r1")
    stored = run.field("r1", "verdict")
    assert stored == make_verdict("r1").encode()
    assert run.verdict("r1", train=3) == b"duplicate"
    assert run.field("r1", "verdict") == stored
    assert [entry["kind"] for entry in run.entries("finished")] == ["verdict"]
    assert run.entries("trajectories") == [{"rid": "r1"}]


def test_a_verdict_takes_off_the_scores_and_the_prompt(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    run.chunk(seq=1, start=3)
    run.score(seq=0)
    run.score(seq=1)
    entries = run.score_entries()
    assert len(entries) == 2
    assert run.verdict(entries=entries) == b"ok"
    assert (run.pending("scores"), run.pending("prompts")) == (0, 0)
    assert (run.entries("scores"), run.entries("prompts")) == ([], [])


def test_a_verdict_that_keeps_nothing_ends_the_rollout_as_empty(run: Run) -> None:
    assert run.judged("r1", train=0) == b""
    assert run.entries("trajectories") == []
    verdict, ending = run.entries("finished")
    assert verdict["kind"] == "verdict"
    assert ending == {"kind": "ending", "rid": "r1", "ending": "dropped", "reason": "empty"}


def test_a_cut_signals_the_writer_and_the_signal_expires(run: Run) -> None:
    run.admit("r1")
    run.admit("r2")
    run.take("w7", "n1")
    for rid in ("r1", "r2"):
        run.chunk(rid)
        run.score(rid)
    run.verdict("r1", stop=False, entries=[])
    assert run.entries("signals:w7") == []
    run.verdict("r2", stop=True)
    assert run.entries("signals:w7") == [{"rid": "r2"}]
    assert 0 < run.client.ttl(run.key("signals:w7")) <= 60


def test_the_buffer_of_minima_is_trimmed_from_its_old_end(run: Run) -> None:
    for number in range(6):
        rid = f"r{number}"
        run.admit(rid)
        run.verdict(rid, minimum=f"0.{number}", size=4, threshold=f"0.5{number}", entries=[])
    assert run.client.lrange(run.key("minima"), 0, -1) == [b"0.2", b"0.3", b"0.4", b"0.5"]
    assert run.client.get(run.key("threshold")) == b"0.55"


def test_without_the_lease_there_is_no_verdict_and_nothing_is_taken_off(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    run.score()
    [entry] = run.score_entries()
    run.lease("arbiter")
    body = make_verdict("r1").encode()
    assert run.plane.call(script("verdict", "x", "r1", body, 2, 0, "", 4, "0.5", "", entry)) == [b"lost"]
    assert run.field("r1", "verdict") is None
    assert run.client.get(run.key("threshold")) is None
    assert run.pending("scores") == 1


def test_notices_of_a_rollout_that_is_gone_are_taken_off_and_the_run_goes_on(run: Run) -> None:
    entry = run.client.xadd(run.key("scores"), {"rid": "booked"})
    run.score_entries()
    assert (
        run.lease("arbiter").call(fenced("verdict", "booked", "", 0, 0, "", 4, "inactive", "", entry))[0] == b"absent"
    )
    assert run.entries("scores") == []
    assert run.client.exists(run.key("rollout:booked")) == 0


# --- settle ---


def test_settling_twice_ends_a_trajectory_once(run: Run) -> None:
    entry = run.judged("r1")
    assert run.settle("r1", entry) == [b"ok", 1]
    assert run.settle("r1", entry, "dropped", "stale") == [b"ok", 0]
    endings = [one for one in run.entries("finished") if one["kind"] == "ending"]
    assert endings == [{"kind": "ending", "rid": "r1", "ending": "trained", "reason": "", "staleness": "0"}]
    assert (run.entries("trajectories"), run.pending("trajectories")) == ([], 0)


def test_one_call_settles_several(run: Run) -> None:
    entries = [run.judged(rid) for rid in ("r1", "r2")]
    reply = run.lease("learner").call(
        fenced("settle", entries[0], "r1", "trained", "", 2, entries[1], "r2", "dropped", "stale", 5)
    )
    assert reply == [b"ok", 2]
    endings = [(one["rid"], one["ending"], one["staleness"]) for one in run.entries("finished") if "ending" in one]
    assert endings == [("r1", "trained", "2"), ("r2", "dropped", "5")]


def test_without_the_lease_nothing_is_settled(run: Run) -> None:
    entry = run.judged("r1")
    run.lease("learner")
    assert run.plane.call(script("settle", "x", entry, "r1", "trained", "", 0)) == [b"lost"]
    assert run.pending("trajectories") == 1


# --- book ---


def test_booking_twice_counts_once_and_removes_the_record(run: Run) -> None:
    entry = run.judged("r1")
    run.settle("r1", entry)
    run.plane.read("books", "feeder", ["finished"], count=100, block_s=0)
    entries = [one for one, _ in run.given("books", "feeder", "finished")]
    assert run.book("r1", "trained", *entries) == [b"ok", 1]
    assert run.book("r1", "trained", *entries) == [b"ok", 0]
    assert run.ledger() == {"admitted": 1, "trained": 1}
    assert run.plane.rollout("r1") == {}
    assert (run.entries("finished"), run.pending("finished")) == ([], 0)
    assert run.client.scard(run.key("open")) == 0


def test_booking_without_a_field_only_acknowledges(run: Run) -> None:
    run.admit("r1")
    entry = run.client.xadd(run.key("finished"), {"kind": "count", "rid": "r1", "generated": "4"})
    assert run.book("r1", "", entry) == [b"ok", 0]
    assert run.entries("finished") == []
    assert run.client.smembers(run.key("open")) == {b"r1"}


def test_a_dead_rollouts_record_stays_for_its_operator(run: Run) -> None:
    run.admit("r1")
    assert run.book("r1", "dead") == [b"ok", 1]
    assert run.field("r1", "head") is not None


def test_without_the_lease_nothing_is_booked(run: Run) -> None:
    run.admit("r1")
    assert run.plane.call(script("book", "x", "r1", "trained")) == [b"lost"]
    assert run.ledger() == {"admitted": 1}


# --- fail ---


def test_a_rollout_is_given_up_after_so_many_attempts_and_ends_as_dead(run: Run) -> None:
    run.admit("r1")
    [[_, entry, *_]] = run.take()
    at = ("prompts", "rollout", entry)
    assert not run.plane.fail("r1", "rollout", "why", max_attempts=3, at=at)
    assert not run.plane.fail("r1", "rollout", "why", max_attempts=3, at=at)
    assert run.entries("dead") == []
    assert run.plane.fail("r1", "rollout", "why", max_attempts=3, shown=b"bytes", at=at)
    assert run.entries("dead") == [{"rid": "r1", "stage": "rollout", "reason": "why", "shown": "bytes"}]
    assert run.entries("finished") == [{"kind": "ending", "rid": "r1", "ending": "dead", "reason": "rollout"}]
    assert (run.entries("prompts"), run.pending("prompts")) == ([], 0)
    assert run.field("r1", "verdict") == b"dead"


@pytest.mark.parametrize("progress", ["chunk", "score"])
def test_progress_clears_the_attempts(run: Run, progress: str) -> None:
    run.admit("r1")
    run.take()
    run.chunk()
    for _ in range(3):
        for _ in range(2):
            assert not run.plane.fail("r1", "teacher", "why", max_attempts=3)
        if progress == "chunk":
            seq = int(run.field("r1", "chunks") or 0)
            run.chunk(seq=seq, start=3 * seq)
        else:
            run.client.hdel(run.key("rollout:r1"), "d:0")
            run.score()
        assert run.field("r1", "attempts") is None


def test_a_rollout_with_a_verdict_does_not_end_a_second_time_as_dead(run: Run) -> None:
    run.judged("r1")
    assert run.plane.fail("r1", "arbiter", "why", max_attempts=1)
    assert [one["kind"] for one in run.entries("finished")] == ["verdict"]
    assert run.field("r1", "verdict") == make_verdict("r1").encode()
    assert len(run.entries("dead")) == 1


def test_a_notice_that_names_no_rollout_is_given_up_at_once(run: Run) -> None:
    entry = run.client.xadd(run.key("scores"), {"what": "?"})
    run.score_entries()
    assert run.plane.fail("", "scores", "no id", max_attempts=9, at=("scores", "arbiter", entry))
    assert (run.entries("scores"), run.pending("scores")) == ([], 0)
    assert len(run.entries("dead")) == 1


# --- again ---


def buried(run: Run, rid: str = "r1") -> str:
    """A rollout that died and is booked; returns the letter's entry."""
    run.admit(rid)
    assert run.plane.fail(rid, "rollout", "why", max_attempts=1)
    assert run.book(rid, "dead") == [b"ok", 1]
    [(entry, _)] = run.client.xrevrange(run.key("dead"), count=1)
    return str(entry.decode())


def request(run: Run) -> bytes:
    [(entry, _)] = run.client.xrange(run.key("again"))
    return bytes(entry)


def resend(run: Run, rid: str, entry: bytes, cursor: int) -> bytes:
    args = (rid, make_head(rid, problem=7).encode(), cursor, "", entry, 7)
    return bytes(run.lease("feeder").call(fenced("admit", *args))[0])


def test_what_is_sent_back_becomes_a_request_and_letter_and_record_go_with_it(run: Run) -> None:
    entry = buried(run)
    assert run.plane.call(script("again", entry, "r1", "7")) == [b"ok"]
    assert run.entries("again") == [{"rid": "r1", "problem": "7"}]
    assert run.entries("dead") == []
    assert run.plane.rollout("r1") == {}
    assert run.ledger() == {"admitted": 1, "dead": 1}
    assert run.plane.call(script("again", entry, "r1", "7")) == [b"absent"]
    assert len(run.entries("again")) == 1


def test_of_two_letters_on_one_rollout_only_one_sends_it_back(run: Run) -> None:
    first = buried(run)
    run.plane.fail("r1", "teacher", "why", max_attempts=1)
    [_, (second, _)] = run.client.xrange(run.key("dead"))
    assert run.plane.call(script("again", second, "r1", "7")) == [b"ok"]
    assert run.plane.call(script("again", first, "r1", "7")) == [b"none"]
    assert len(run.entries("again")) == 1
    assert run.plane.call(script("again", first, "r1", "")) == [b"ok"]
    assert run.entries("dead") == []


@pytest.mark.parametrize("problem", ["7", ""])
def test_a_rollout_is_booked_before_it_is_sent_back_or_removed(run: Run, problem: str) -> None:
    run.admit("r1")
    run.plane.fail("r1", "rollout", "why", max_attempts=1)
    [(entry, _)] = run.client.xrange(run.key("dead"))
    assert run.plane.call(script("again", entry, "r1", problem)) == [b"open"]
    assert run.field("r1", "head") is not None
    assert (len(run.entries("dead")), run.entries("again")) == (1, [])


def test_a_run_that_is_over_takes_nothing_back_and_lets_it_be_removed(run: Run) -> None:
    entry = buried(run)
    run.lease("learner").advance("state", "trained")
    assert run.plane.call(script("again", entry, "r1", "7")) == [b"ended"]
    assert run.field("r1", "head") is not None
    assert run.plane.call(script("again", entry, "r1", "")) == [b"ok"]
    assert (run.entries("dead"), run.entries("again")) == ([], [])
    assert run.plane.rollout("r1") == {}


def test_a_letter_on_a_notice_is_removed_by_itself(run: Run) -> None:
    run.admit("r1")
    run.plane.fail("", "scores", "no id", max_attempts=1)
    [(entry, _)] = run.client.xrange(run.key("dead"))
    assert run.plane.call(script("again", entry, "", "7")) == [b"none"]
    assert run.plane.call(script("again", entry, "", "")) == [b"ok"]
    assert run.entries("dead") == []
    assert run.field("r1", "head") is not None


def test_admission_takes_the_request_off_once(run: Run) -> None:
    run.plane.call(script("again", buried(run), "r1", "7"))
    entry = request(run)
    assert resend(run, "r2", entry, 2) == b"ok"
    assert run.entries("again") == []
    assert run.field("r2", "problem") == b"7"
    assert run.field("r2", "threshold") is None
    assert run.ledger() == {"admitted": 2, "dead": 1}
    # The same call again, because its answer was lost; and another that still has the request in its hand.
    assert resend(run, "r2", entry, 2) == b"ok"
    assert resend(run, "r3", entry, 3) == b"taken"
    assert run.client.smembers(run.key("open")) == {b"r2"}
    assert run.client.get(run.key("cursor")) == b"2"
    assert run.ledger() == {"admitted": 2, "dead": 1}


def test_a_request_that_was_given_up_leaves_its_stream(run: Run) -> None:
    entry = run.client.xadd(run.key("again"), {"rid": "r1"})
    assert run.plane.fail("", "again", "no problem", max_attempts=1, at=("again", "", entry))
    assert run.entries("again") == []
    assert len(run.entries("dead")) == 1


@pytest.mark.parametrize("share", [0.8, 1.5])
def test_a_full_redis_keeps_the_request(own_redis: EmbeddedRedis, start: Callable[..., Run], share: float) -> None:
    run = start(own_redis)
    entry = buried(run)
    run.client.config_set("maxmemory", int(run.client.info("memory")["used_memory"] / share))
    assert run.plane.call(script("again", entry, "r1", "7")) == [b"ok"]  # it takes off more than it adds
    assert resend(run, "r2", request(run), 2) == b"full"
    assert run.plane.rollout("r2") == {}
    run.client.config_set("maxmemory", 0)
    assert resend(run, "r2", request(run), 2) == b"ok"
    assert run.entries("again") == []


# --- publish, advance ---


def test_the_policy_version_never_goes_back(run: Run) -> None:
    learner = run.lease("learner")
    assert learner.call(fenced("publish", 3, 30, "v00000003.safetensors", "aa")) == [b"ok"]
    assert learner.call(fenced("publish", 3, 31, "other", "bb")) == [b"old", 3]
    assert learner.call(fenced("publish", 2, 31, "other", "bb")) == [b"old", 3]
    assert run.plane.policy() == {"version": "3", "step": "30", "file": "v00000003.safetensors", "sha256": "aa"}
    assert learner.call(fenced("publish", 4, 31, "v00000004.safetensors", "bb")) == [b"ok"]
    assert run.plane.policy()["version"] == "4"


def test_without_the_lease_nothing_is_published(run: Run) -> None:
    assert run.plane.call(script("publish", "x", 1, 1, "file", "aa")) == [b"lost"]
    assert run.plane.policy() == {}


def test_step_and_state_are_advanced_by_the_holder_of_the_lease_alone(run: Run) -> None:
    run.lease("learner").advance("step", 12)
    assert run.plane.policy() == {"step": "12"}
    run.lease("feeder").advance("state", "ended")
    assert run.plane.state() == "ended"
    assert run.plane.call(script("advance", "learner", "x", "step", 13)) == [b"lost"]
    assert run.plane.policy() == {"step": "12"}


# --- lease ---


def test_a_lease_has_one_holder_until_it_is_dropped(run: Run) -> None:
    def call(token: str, mode: str, ms: int = 60_000) -> bytes:
        return bytes(run.plane.call(script("lease", "learner", token, ms, mode))[0])

    assert call("a", "take") == b"ok"
    assert call("a", "take") == b"ok"
    assert call("b", "take") == b"held"
    assert call("b", "renew") == b"held"
    assert call("b", "drop") == b"held"
    assert call("a", "renew") == b"ok"
    assert call("a", "drop") == b"ok"
    assert call("b", "take") == b"ok"
    assert call("a", "renew") == b"held"


def test_a_lease_that_ran_out_is_renewed_only_while_nobody_took_it(run: Run) -> None:
    def call(token: str, mode: str, ms: int) -> bytes:
        return bytes(run.plane.call(script("lease", "learner", token, ms, mode))[0])

    call("a", "take", 20)
    time.sleep(0.04)
    assert run.client.exists(run.key("lease:learner")) == 0
    assert call("a", "renew", 20) == b"ok"
    time.sleep(0.04)
    assert call("b", "take", 20) == b"ok"
    time.sleep(0.04)
    assert call("a", "renew", 20) == b"held"
    assert call("b", "renew", 20) == b"ok"


def test_a_call_of_a_slow_holder_renews_and_goes_through(run: Run) -> None:
    lease = Lease(run.plane, "feeder", 0.05)
    lease.acquire(run.plane._stop)
    time.sleep(0.08)
    assert lease.call(fenced("admit", "r1", make_head().encode(), 1)) == [b"ok"]


def test_a_call_of_a_former_holder_raises_and_writes_nothing(run: Run) -> None:
    old = Lease(run.plane, "feeder", 0.05)
    old.acquire(run.plane._stop)
    time.sleep(0.08)
    new = Lease(run.plane, "feeder", 60.0)
    new.acquire(run.plane._stop)
    with pytest.raises(LeaseLost):
        old.call(fenced("admit", "r1", make_head().encode(), 1))
    with pytest.raises(LeaseLost):
        old.advance("state", "ended")
    with pytest.raises(LeaseLost):
        old.keep()
    old.drop()
    assert run.plane.state() == "open"
    assert run.plane.rollout("r1") == {}
    assert new.call(fenced("admit", "r1", make_head().encode(), 1)) == [b"ok"]


def test_a_lease_that_is_kept_by_another_is_not_waited_for_without_end(run: Run) -> None:
    run.lease("feeder")
    began = time.monotonic()
    with pytest.raises(LeaseLost, match="another feeder"):
        Lease(run.plane, "feeder", 0.2).acquire(run.plane._stop, wait_s=0.1)
    assert time.monotonic() - began < 5


# --- the run ---


def test_every_script_says_that_the_run_is_gone(run: Run) -> None:
    learner = run.lease("learner")
    run.client.delete(run.key("run"))
    calls = {
        "admit": ("t", "r1", b"h", 1),
        "take": ("w", "n", 1, 0, "0-0"),
        "restore": ("t", 1, 0, 0),
        "beat": ("w", "0-0", 0, "r1", "1-1", "n"),
        "release": ("w", "r1", "1-1", "n"),
        "chunk": ("r1", "n", 0, b"", b"", 0, 1, ""),
        "count": ("r1", "n", 1),
        "claim": ("chunks:0", "t", 0, 1),
        "attempt": ("r1", "teacher", "begin"),
        "score": ("0", "1-1", "r1", 0, b"", b"", b""),
        "look": (4, 0, "r1", 0),
        "verdict": ("t", "r1", b"", 0, 0, "", 1, "inactive", ""),
        "settle": ("t",),
        "book": ("t", "r1", ""),
        "fail": ("r1", "s", "r", 1, b"", "", "", "", "x"),
        "publish": ("t", 1, 1, "f", "s"),
        "advance": ("learner", "t", "step", 1),
        "again": ("1-1", "r1", "0"),
        "lease": ("learner", "t", 10, "take"),
        "exclusive": ("server", "t", 10, "take"),
        "adopt": ("learner", "t", "trajectories", "learner", 10),
        "close": ("t", "scores", "arbiter"),
        "reopen": ("config",),
        "seen": ("w", "teacher", 1000, "", "role", "teacher"),
        "gone": ("w", "teacher", "chunks:0"),
        "sweep": (1000, "prompts", "rollout"),
        "refused": (7,),
        "calibrate": ("t", 1, 1, "inactive", ""),
        "reward": ("t", "r1", "right"),
        "unreward": ("t", "r1"),
        "forgo": ("t", "r1", "split"),
    }
    assert set(calls) == set(run.plane._scripts)
    before = set(run.client.scan_iter(run.plane.prefix.replace("{", "[{]") + "*"))
    for name, args in calls.items():
        with pytest.raises(RunGone, match=r"does not know the run"):
            run.plane.call(script(name, *args))
    with pytest.raises(RunGone):
        learner.call(fenced("publish", 1, 1, "f", "s"))
    assert set(run.client.scan_iter(run.plane.prefix.replace("{", "[{]") + "*")) == before
    assert run.plane.state() is None


def test_an_admission_that_arrives_late_admits_nothing_even_when_its_rollout_is_booked(run: Run) -> None:
    run.admit("r1")
    run.book("r1", "dropped:empty")
    assert run.admit("r1") == b"ok"
    assert run.plane.rollout("r1") == {}
    assert run.ledger() == {"admitted": 1, "dropped:empty": 1}


def test_an_admission_behind_which_others_are_missing_is_refused(run: Run) -> None:
    """Redis lost what was admitted last."""
    run.admit("r1")
    assert run.lease("feeder").call(fenced("admit", "r9", make_head("r9").encode(), 9)) == [b"behind"]
    assert run.plane.rollout("r9") == {}


def test_a_late_restore_changes_nothing(run: Run) -> None:
    for number in range(1, 4):
        run.admit(f"r{number}")
    run.lease("feeder").call(fenced("restore", 2, 50, 0, "admitted", 2))
    assert (run.ledger(), run.plane.generated()) == ({"admitted": 3}, 0)
    assert run.client.get(run.key("cursor")) == b"3"


def test_a_report_that_arrives_twice_counts_once(run: Run) -> None:
    run.admit("r1")
    args = ("r1", "teacher", "why", 3, b"", "", "", b"", "report-1")
    assert [run.plane.call(script("fail", *args)) for _ in range(3)] == [[b"again", 1]] * 3
    assert run.plane.call(script("fail", *args[:-1], "report-2")) == [b"again", 2]
    last = (*args[:-1], "report-3")
    assert [run.plane.call(script("fail", *last)) for _ in range(2)] == [[b"dead"]] * 2
    assert len(run.entries("dead")) == 1


def test_a_malformed_notice_that_is_reported_twice_is_one_dead_letter(run: Run) -> None:
    entry = run.client.xadd(run.key("scores"), {"junk": "1"})
    args = ("", "scores", "why", 1, b"", "scores", "arbiter", entry, "report")
    assert [run.plane.call(script("fail", *args)) for _ in range(2)] == [[b"dead"]] * 2
    assert len(run.entries("dead")) == 1


def test_a_closed_run_has_empty_streams_and_its_groups(run: Run) -> None:
    run.judged("r1")
    run.admit("r2")
    run.take()
    run.lease("feeder").call(fenced("close", *(part for pair in run.plane.groups for part in pair)))
    for stream, group in run.plane.groups:
        assert run.client.xlen(run.key(stream)) == 0
        assert run.client.xpending(run.key(stream), group)["pending"] == 0
    run.admit("r3")
    assert [taken[0] for taken in run.take()] == [b"r3"]


def test_every_owner_of_a_rollout_stands_in_its_record(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    run.chunk("r1", "n1")
    assert run.take("w2", "n2", idle_ms=0) == []
    time.sleep(0.02)
    [taken] = run.take("w2", "n2", idle_ms=10)
    assert taken[2] == b"1"
    assert run.field("r1", "owners") == b"n1 0 n2 1 "
    assert run.field("r1", "owner") == b"n2"


def test_a_second_notice_in_prompts_is_taken_off_and_owns_nothing(run: Run) -> None:
    run.admit("r1")
    run.client.xadd(run.key("prompts"), {"rid": "r1"})
    assert len(run.take("w1", "n1")) == 1
    assert run.take("w2", "n2") == []
    assert run.field("r1", "owner") == b"n1"
    assert len(run.entries("prompts")) == 1


def test_creating_a_run_that_exists_changes_nothing(run: Run) -> None:
    run.admit("r1")
    run.lease("learner").advance("state", "trained")
    create_run(run.client, run.config, run.plane.run_key)
    assert run.plane.state() == "trained"
    assert run.entries("prompts") == [{"rid": "r1"}]
    assert current_run(run.client, run.config.name) == run.plane.run_key


def test_runs_do_not_see_each_other(run: Run) -> None:
    run.admit("r1")
    other = Plane(run.client, run.plane.run_key + "x", shards=4, wait_s=5, claim_pause_s=1)
    create_run(run.client, run.config, other.run_key)
    try:
        assert other.call(script("take", "w", "n", 5, 0)) == [b"ok"]
        assert other.rollout("r1") == {}
    finally:
        for name in list(run.client.scan_iter(other.prefix.replace("{", "[{]") + "*")):
            run.client.delete(name)


# --- hashes that somebody broke ---


@pytest.mark.parametrize("junk", ["many", "", "1e9", "-3", "9" * 30])
def test_a_junk_version_is_replaced_by_the_learners(run: Run, junk: str) -> None:
    run.client.hset(run.key("policy"), mapping={"version": junk, "step": "4"})
    assert run.lease("learner").call(fenced("publish", 7, 3, "v00000007.safetensors", "00")) == [b"ok"]
    assert run.plane.policy()["version"] == "7"
    assert run.lease("learner").call(fenced("publish", 6, 3, "v00000006.safetensors", "00"))[0] == b"old"


def test_a_junk_count_of_attempts_begins_anew(run: Run) -> None:
    run.admit("r1")
    run.client.hset(run.key("rollout:r1"), "attempts", "many")
    assert not run.plane.fail("r1", "rollout", "broken", max_attempts=2)
    assert run.plane.fail("r1", "rollout", "broken", max_attempts=2)


def test_a_junk_count_of_scored_chunks_does_not_stop_the_score(run: Run) -> None:
    run.admit("r1")
    run.take()
    run.chunk("r1")
    run.client.hset(run.key("rollout:r1"), "scored", "many")
    assert run.score("r1") == b"ok"
    assert run.field("r1", "d:0") is not None


@pytest.mark.parametrize(("field", "value"), [("step", b"many"), ("covered", b"\xff\xfe"), ("step", b"-1")])
def test_steps_that_are_no_number_count_as_none(run: Run, field: str, value: bytes) -> None:
    run.client.hset(run.key("policy"), mapping={"step": 5, "covered": 4})
    assert run.plane.steps() == (5, 4)
    run.client.hset(run.key("policy"), field, value)
    assert run.plane.steps() == ((0, 4) if field == "step" else (5, 0))


# --- takeovers of chunks ---


def given(run: Run, teacher: str) -> list[tuple[str, int]]:
    """What a teacher claims, whoever held it: rollout and takeovers without progress."""
    return [
        (fields[b"rid"].decode(), takeovers)
        for _, (_, fields), takeovers in run.plane.claim_chunks(teacher, idle_s=0.0, count=10)
    ]


def held(run: Run, teacher: str, chunks: int = 2) -> None:
    run.admit("r1")
    run.take()
    for seq in range(chunks):
        run.chunk("r1", seq=seq, start=3 * seq)
    shard = f"chunks:{run.plane.shard_of('r1')}"
    found = run.plane.read("teacher", teacher, [shard], count=10, block_s=0)
    run.notices |= {("r1", seq): entry for seq, (_, (entry, _)) in enumerate(found)}
    assert len(found) == chunks


def test_a_takeover_counts_once_for_all_chunks_of_a_rollout_and_a_score_clears_it(run: Run) -> None:
    held(run, "t1")
    assert given(run, "t2") == [("r1", 1), ("r1", 1)]
    assert given(run, "t3") == [("r1", 2), ("r1", 2)]
    assert run.plane.attempt("r1", "teacher") == 1
    assert run.score("r1") == b"ok"
    assert (run.field("r1", "taken"), run.field("r1", "begun:teacher")) == (None, None)
    assert given(run, "t4") == [("r1", 1)]


def test_what_a_teacher_takes_from_itself_counts_nothing(run: Run) -> None:
    held(run, "t1")
    assert given(run, "t1") == [("r1", 0), ("r1", 0)]


def test_a_teacher_that_says_it_lives_keeps_its_chunks(run: Run) -> None:
    held(run, "t1")
    run.plane.seen("t1", role="teacher")
    time.sleep(0.03)
    assert run.plane.claim_chunks("t2", idle_s=0.02, count=10) != []
    run.plane.seen("t2", role="teacher")
    time.sleep(0.03)
    run.plane.seen("t2", role="teacher")
    assert run.plane.claim_chunks("t3", idle_s=0.025, count=10) == []
    run.plane.gone("t2", role="teacher")
    assert len(run.plane.claim_chunks("t3", idle_s=0.025, count=10)) == 2


def test_chunks_behind_many_that_are_held_are_claimed_and_deleted_ones_are_let_go(run: Run) -> None:
    shard = "chunks:0"
    for number in range(250):
        run.client.xadd(run.key(shard), {"rid": f"r{number}"})
    run.plane.read("teacher", "alive", [shard], count=240, block_s=0)
    dead = run.plane.read("teacher", "dead", [shard], count=10, block_s=0)
    run.client.xdel(run.key(shard), dead[0][1][0])
    time.sleep(1.0)
    run.plane.seen("alive", role="teacher")
    assert len(run.plane.claim_chunks("t2", idle_s=0.9, count=5)) == 5
    assert len(run.plane.claim_chunks("t2", idle_s=0.9, count=32)) == 4
    assert run.client.xpending(run.key(shard), "teacher")["pending"] == 249


@pytest.mark.parametrize("field", ["taken", "begun:teacher"])
def test_junk_counts_of_takeovers_begin_anew(run: Run, field: str) -> None:
    held(run, "t1")
    run.client.hset(run.key("rollout:r1"), field, "many")
    assert given(run, "t2") == [("r1", 1), ("r1", 1)]
    assert run.plane.attempt("r1", "teacher") == 1
    assert run.plane.attempt("r1", "teacher") == 2
    run.plane.attempt_over("r1", "teacher")
    assert run.plane.attempt("r1", "teacher") == 1


def test_no_record_is_made_by_counting(run: Run) -> None:
    assert run.plane.attempt("r9", "teacher") == 0
    run.client.xadd(run.key("chunks:0"), {"rid": "r9", "seq": 0})
    run.plane.read("teacher", "t1", ["chunks:0"], count=10, block_s=0)
    assert given(run, "t2") == [("r9", 0)]
    assert not run.client.exists(run.key("rollout:r9"))
