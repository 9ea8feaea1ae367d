"""Who lives, by what they say of themselves: what they hold stays theirs, what they leave behind is taken off."""

from __future__ import annotations

import time

import pytest
from samples import Run, script

from common.wire.plane import Roster


def roster(silence_s: float = 60.0) -> Roster:
    return Roster(silence_s)


def consumers(run: Run, stream: str, group: str) -> set[str]:
    return {one["name"].decode() for one in run.client.xinfo_consumers(run.key(stream), group)}


def idle(ms: int) -> int:
    time.sleep((ms + 5) / 1000)
    return ms


# --- what a worker holds ---


def test_a_worker_that_says_it_lives_keeps_its_rollouts_however_long_its_loop_is_away(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    ms = idle(30)
    run.plane.seen("w1", role="rollout")
    assert run.take("w2", "n2", idle_ms=ms) == []
    assert run.field("r1", "owner") == b"n1"
    [[rid, *_]] = run.take("w2", "n2", idle_ms=idle(30))  # silent for as long
    assert rid == b"r1"


def test_a_worker_takes_back_what_it_had_lost_from_sight(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")  # the answer was lost
    ms = idle(30)
    run.plane.seen("w1", role="rollout")
    [[rid, *_]] = run.take("w1", "n2", idle_ms=ms)
    assert rid == b"r1"


def test_what_a_living_worker_hands_back_is_anybodys(run: Run) -> None:
    run.admit("r1")
    [[_, entry, *_]] = run.take("w1", "n1")
    run.plane.seen("w1", role="rollout")
    run.plane.call(script("release", "w1", "r1", entry, "n1"))
    [[rid, *_, claims]] = run.take("w2", "n2", idle_ms=60_000)
    assert (rid, claims) == (b"r1", 0)


def test_behind_many_that_are_held_the_silent_ones_are_found_a_page_at_a_time(run: Run) -> None:
    for number in range(130):
        run.admit(f"r{number}")
    assert len(run.take("w1", "n1", count=125)) == 125
    assert len(run.take("dead", "n0", count=5)) == 5
    ms = idle(30)
    run.plane.seen("w1", role="rollout")
    first = run.plane.call(script("take", "w2", "n2", 3, 1000 * ms, b"0-0"))  # nothing is as idle as that
    assert first[2:] == []
    assert first[1].startswith(b"(")
    found, at = [], b"0-0"
    for _ in range(4):
        run.plane.seen("w1", role="rollout")
        _, at, *taken = run.plane.call(script("take", "w2", "n2", 3, ms, at))
        found += [one[0].decode() for one in taken]
    assert sorted(found) == [f"r{number}" for number in range(125, 130)]


def test_an_entry_deleted_while_pending_is_let_go(run: Run) -> None:
    run.admit("r1")
    [[_, entry, *_]] = run.take("w1", "n1")
    run.client.xdel(run.key("prompts"), entry)
    assert run.take("w2", "n2", idle_ms=idle(30)) == []
    assert run.pending("prompts") == 0


# --- the roster ---


def test_a_roster_is_told_when_somebody_came_or_went_and_not_otherwise(run: Run) -> None:
    mine, yours = roster(), roster()
    run.plane.seen("t1", role="teacher", roster=mine)
    run.plane.seen("t2", role="teacher", roster=yours)
    run.plane.seen("w1", role="rollout")
    assert (mine.names, sorted(yours.names)) == (["t1"], ["t1", "t2"])
    run.plane.seen("t1", role="teacher", roster=mine)
    assert sorted(mine.names) == ["t1", "t2"]
    reply = run.plane.call(script("seen", "t1", "teacher", 60_000, mine.revision, "role", "teacher"))
    assert reply == [b"ok", mine.revision], "nothing more than that it is still that one"
    run.plane.gone("t2", role="teacher")
    run.plane.seen("t1", role="teacher", roster=mine)
    assert mine.names == ["t1"]


def test_who_is_silent_leaves_the_roster(run: Run) -> None:
    mine = roster(silence_s=0.05)
    run.plane.seen("t2", role="teacher", roster=roster())
    run.plane.seen("t1", role="teacher", roster=mine)
    assert sorted(mine.names) == ["t1", "t2"]
    time.sleep(0.06)
    run.plane.seen("t1", role="teacher", roster=mine)
    assert mine.names == ["t1"]


def test_a_roster_that_redis_lost_is_told_anew(run: Run) -> None:
    mine = roster()
    run.plane.seen("t1", role="teacher", roster=mine)
    before = mine.revision
    run.client.delete(run.key("roster:teacher"), run.key("changes:teacher"))
    time.sleep(1.1)  # the seconds of the clock move it on
    run.plane.seen("t2", role="teacher", roster=roster())
    run.plane.seen("t1", role="teacher", roster=mine)
    assert (sorted(mine.names), mine.revision != before) == (["t1", "t2"], True)


# --- what workers leave behind ---


def test_a_worker_that_goes_leaves_no_name_where_it_owes_nothing(run: Run) -> None:
    run.admit("r1")
    run.take("w1", "n1")
    for stream in ("chunks:0", "chunks:1"):
        run.client.xgroup_createconsumer(run.key(stream), "teacher", "t1")
    run.plane.seen("t1", role="teacher", roster=roster())
    run.plane.gone("t1", role="teacher", streams=["chunks:0", "chunks:1"])
    assert consumers(run, "chunks:0", "teacher") | consumers(run, "chunks:1", "teacher") == set()
    assert run.plane.live(60) == {}
    run.plane.gone("w1", role="rollout", streams=["prompts"])
    assert consumers(run, "prompts", "rollout") == {"w1"}, "what it was given is still to be taken over"
    assert run.pending("prompts") == 1


def test_names_of_killed_workers_are_swept_once_nothing_is_pending_for_them(run: Run) -> None:
    run.admit("r1")
    run.take("killed", "n1")
    for stream, group, name in (
        ("prompts", "rollout", "idle and killed"),
        ("prompts", "rollout", "alive"),
        ("chunks:0", "teacher", "killed teacher"),
    ):
        run.client.xgroup_createconsumer(run.key(stream), group, name)
    run.plane.seen("alive", role="rollout")
    run.client.zadd(run.key("workers"), {"killed": 1.0, "idle and killed": 1.0})
    assert run.plane.sweep(silent_s=30.0) == 2
    assert consumers(run, "prompts", "rollout") == {"killed", "alive"}
    assert consumers(run, "chunks:0", "teacher") == set()
    assert run.client.zrange(run.key("workers"), 0, -1) == [b"alive"]
    run.take("alive", "n4", idle_ms=idle(30))  # it has taken over what the killed one held
    assert run.plane.sweep(silent_s=30.0) == 1
    assert consumers(run, "prompts", "rollout") == {"alive"}
    assert run.pending("prompts") == 1


@pytest.mark.parametrize("script", ["seen", "gone"])
def test_a_worker_that_nobody_hears_goes_on(run: Run, script: str) -> None:
    run.client.delete(run.key("run"))
    if script == "seen":
        run.plane.seen("w1", role="rollout", roster=(mine := roster()))
        assert mine.names == []
    else:
        run.plane.gone("w1", role="rollout", streams=["prompts"])
