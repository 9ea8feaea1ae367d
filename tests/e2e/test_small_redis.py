"""Whole runs, with real processes, on a Redis that holds no more than a config needs at least."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_deterministic import EXACT, result
from test_run import DEMO, SMALL, check_books, finish, start

from common.config import load
from common.footprint import least_bytes, maxmemory_mb
from common.wire.connect import connect
from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
# No checkpoint is due before the last step: whatever room is made is made because there is none.
LONG = ("rollout.max_completion_length=192", "checkpoints.every_steps=1000", "eval.every_steps=0")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis", maxmemory_mb=20)
    server.start()
    yield server
    server.stop()


def leave(server: EmbeddedRedis, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Leave a server the least that a run with these settings needs; returns the settings with the server in them."""
    config = load(DEMO, list(settings))
    with connect(server.url) as client:
        client.config_set("maxmemory", maxmemory_mb(least_bytes(config)) << 20)
    return (*settings, f"redis.url={server.url}", f"redis.broker_url={server.broker_url}")


def test_a_run_on_the_least_memory_makes_its_steps(small: EmbeddedRedis, tmp_path: Path) -> None:
    """Six batches fit, the run has fourteen: what is trained must make room, and no chunk waits for ever."""
    settings = (*SMALL[:1], "learner.max_steps=40", "termination.policy=none", *LONG)
    code, output = finish(start(tmp_path, name="small", settings=leave(small, settings)))
    assert code == 0, output
    assert re.search(r"warning +maxmemory of .*: the run will wait for memory", output)
    check_books(tmp_path / "small", steps=40)
    learner = (tmp_path / "small" / "logs" / "learner.log").read_text()
    assert "no batch comes and Redis is short of memory: checkpoint at step" in learner
    for log in (tmp_path / "small" / "logs").glob("*.log"):
        assert log.read_text().count("Redis is full") <= 2, f"{log.name} says it at every try"


def test_a_deterministic_run_ends_with_the_same_bits_on_little_memory(small: EmbeddedRedis, tmp_path: Path) -> None:
    settings = (*(one for one in EXACT if "max_completion" not in one and "checkpoints" not in one), *LONG)
    settings = tuple("learner.max_steps=20" if "max_steps" in one else one for one in settings)
    code, output = finish(start(tmp_path, name="whole", settings=settings))
    assert code == 0, output
    code, output = finish(start(tmp_path, name="little", settings=leave(small, settings)))
    assert code == 0, output
    assert "checkpoint at step" in (tmp_path / "little" / "logs" / "learner.log").read_text()
    expected, found = result(tmp_path / "whole"), result(tmp_path / "little")
    for one in (expected, found):  # how much of what was cut had been scored, and so is judged, is a matter of timing
        one["rollouts"] = [line[:-1] for line in one["rollouts"]]
    for name, value in expected.items():
        assert found[name] == value, name
