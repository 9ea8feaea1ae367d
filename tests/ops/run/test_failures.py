"""When a role is given up: after failures without progress, however far apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from samples import Run

from common.rids import rid_of
from ops.reach.embedded import EmbeddedRedis
from ops.run.failures import MOST, Failures, mark_of


def test_failures_without_progress_are_counted_and_progress_clears_the_count() -> None:
    failures = Failures()
    assert [failures.one_more("here") for _ in range(MOST)] == [False] * MOST
    assert not failures.one_more("further")
    assert [failures.one_more("further") for _ in range(MOST)] == [False] * (MOST - 1) + [True]


def test_unknown_progress_is_no_progress() -> None:
    failures = Failures()
    failures.one_more("here")
    assert [failures.one_more(None) for _ in range(MOST)] == [False] * (MOST - 1) + [True]


def test_a_redis_that_lost_its_data_clears_the_count() -> None:
    failures = Failures()
    for _ in range(MOST):
        failures.one_more(("policy", "step", b"7"))
    assert not failures.one_more(("policy", "step", None))


@pytest.mark.parametrize(
    ("role", "act"),
    [
        ("learner", lambda run: run.client.hset(run.key("policy"), "step", 1)),
        ("rollout", lambda run: run.client.hset(run.key("policy"), "generated", 16)),
        ("teacher", lambda run: run.client.xadd(run.key("scores"), {"rid": "r000000000"})),
        ("arbiter", lambda run: run.client.xadd(run.key("trajectories"), {"rid": "r000000000"})),
        ("feeder", lambda run: run.admit(rid_of(0))),
        ("evaluator", lambda run: (run.config.run_dir / "eval.jsonl").write_text("{}\n")),
    ],
)
def test_each_mark_is_changed_by_its_own_role_alone(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], role: str, act: Callable[[Run], object]
) -> None:
    run = start(embedded_redis)
    folder: Path = run.config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    roles = ("learner", "rollout", "teacher", "arbiter", "feeder", "evaluator")
    before = {name: mark_of(name, run.plane, folder) for name in roles}
    act(run)
    after = {name: mark_of(name, run.plane, folder) for name in roles}
    assert {name for name in roles if before[name] != after[name]} == {role}


def test_an_entry_that_was_removed_from_a_stream_counts_as_progress(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run]
) -> None:
    run = start(embedded_redis)
    before = mark_of("teacher", run.plane, run.config.run_dir)
    run.client.xdel(run.key("scores"), run.client.xadd(run.key("scores"), {"rid": "r000000000"}))
    assert mark_of("teacher", run.plane, run.config.run_dir) != before


def test_the_mark_is_none_if_redis_does_not_answer(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(embedded_redis)

    def refuse(*_: object, **__: object) -> None:
        raise redis.exceptions.ConnectionError("away")

    monkeypatch.setattr(redis.Redis, "hget", refuse)
    assert mark_of("learner", run.plane, run.config.run_dir) is None
