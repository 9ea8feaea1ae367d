"""A whole run, with real processes, on a Redis that holds no more than its config needs at least."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, finish, start
from small_redis import SHORT, leave_least

from ops.reach.embedded import EmbeddedRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_run_on_the_least_memory_makes_its_steps(small_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """Six batches fit, the run has fourteen: what is trained must make room, and no chunk waits for ever."""
    settings = (
        *SMALL[:1],
        "learner.max_steps=14",
        "termination.policy=none",
        "rollout.max_completion_length=192",
        "checkpoints.every_steps=1000",  # none is due: whatever room is made is made because there is none
        "eval.every_steps=0",
    )
    code, output = finish(start(tmp_path, name="small", settings=leave_least(small_redis, settings)))
    assert code == 0, output
    assert re.search(r"warning +maxmemory of .*: the run will wait for memory", output)
    check_books(tmp_path / "small", steps=14)
    assert SHORT in (tmp_path / "small" / "logs" / "learner.log").read_text()
    for log in (tmp_path / "small" / "logs").glob("*.log"):
        assert log.read_text().count("Redis is full") <= 2, f"{log.name} says it at every try"
