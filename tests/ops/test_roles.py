"""One role in this process, on a real Redis."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from samples import Run

from actors.books import read_lines, rid_of
from common.pretrained import PACKAGE_ROOT
from ops.embedded import EmbeddedRedis
from ops.roles import RUN_KEY, run_role
from ops.rundir import write_text

MODELS = {name: {"model": str(PACKAGE_ROOT / "ops" / "models" / name)} for name in ("student", "teacher")}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A role sets its own: they are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_feeder_that_died_while_it_closed_the_run_goes_on_with_that(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(
        embedded_redis,
        redis={"url": embedded_redis.url, "broker_url": embedded_redis.broker_url},
        name="closed",
        **MODELS,
    )
    for number in range(3):
        run.admit(rid_of(number))
    run.lease("feeder").advance("state", "ended")
    run.lease("feeder").drop()  # here it was killed: nothing of these three is booked
    run.config.run_dir.mkdir()
    write_text(run.config.run_dir / "config.yaml", run.config.to_yaml())
    monkeypatch.setenv(RUN_KEY, run.plane.run_key)
    assert run_role("feeder", run.config) == 0
    lines = list(read_lines(run.config.run_dir / "rollouts.jsonl"))
    assert [(line["rid"], line["reason"]) for line in lines] == [(rid_of(number), "run_end") for number in range(3)]
    assert run.ledger() == {"admitted": 3, "dropped:run_end": 3}
    assert run.entries("prompts") == []
