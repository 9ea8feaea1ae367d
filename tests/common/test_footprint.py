"""The formula of what a rollout takes up, held against what it does take up on each supported Redis."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Run, fenced, make_config, make_verdict, make_view, write_whole

from common.config import Config, load
from common.footprint import (
    ALLOWED_SHARE,
    free_bytes,
    growth_bytes,
    least_bytes,
    maxmemory_mb,
    most_bytes,
    rollout_bytes,
)
from ops.reach.embedded import EmbeddedRedis

ROOT = Path(__file__).parents[2]
_FIRST = 3  # rollouts that make streams, groups and scripts grow to their size


def used(run: Run) -> int:
    return int(run.plane.memory()["used_memory"])


def settled(run: Run, most: int) -> int:
    """`used`, once it is at most `most`, or after six seconds: the buffers of a connection are counted too, and Redis
    gives them back only when it has been idle for two."""
    until = time.monotonic() + 6.0
    while (found := used(run)) > most and time.monotonic() < until:
        time.sleep(0.1)
    return found


def to_the_verdict(run: Run, rid: str) -> None:
    """The rest of a rollout that was begun: written to its end, scored, judged, and waiting to be trained."""
    length = run.config.rollout.max_completion_length
    assert write_whole(run, rid) == b"ok"
    tokens, divergence = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
    view = make_view(divergence.tolist()).view if run.config.stores_view else None
    verdict = make_verdict(
        rid,
        tokens=tokens,
        divergence=divergence,
        trigger=length,
        keep=length,
        train=length,
        generated=length,
        view=view,
    )
    args = (rid, verdict.encode(), length, 0, "0.5", 16, "0.5", "", *run.score_entries())
    assert run.lease("arbiter").call(fenced("verdict", *args))[0] == b"ok"


@pytest.mark.parametrize(
    ("outcomes", "chunk", "length", "count"),
    [(8, 12, 192, 24), (2, 8, 64, 40), (1, 16, 128, 40), (16, 16, 256, 12), (64, 64, 1024, 6), (128, 32, 256, 8)],
)
@pytest.mark.parametrize("views", [False, True])
def test_a_rollout_takes_up_no_more_than_the_formula_says_and_not_much_less(
    any_redis: EmbeddedRedis, start: Callable[..., Run], outcomes: int, chunk: int, length: int, count: int, views: bool
) -> None:
    rollout = {"max_completion_length": length, "chunk_tokens": chunk}
    run = start(
        any_redis,
        rollout=rollout,
        termination={"teacher_top_k": outcomes},
        data={"max_prompt_length": 24},
        feeder={"record_views": views},
    )
    half = length // 2 // chunk * chunk
    for number in range(_FIRST):
        run.admit(f"first{number}", prompt=np.arange(24, dtype=np.int32))
        run.take()
        to_the_verdict(run, f"first{number}")
    before = used(run)
    for number in range(count):
        run.admit(f"r{number}", prompt=np.arange(24, dtype=np.int32))
        run.take()
        write_whole(run, f"r{number}", until=half)
    halfway = used(run)
    for number in range(count):
        to_the_verdict(run, f"r{number}")
    now = settled(run, before + count * rollout_bytes(run.config))
    each, left = (now - before) / count, (now - halfway) / count
    assert 0.5 * rollout_bytes(run.config) <= each <= rollout_bytes(run.config)
    assert left <= growth_bytes(run.config, half)


def test_what_a_teacher_adds_takes_as_much_as_what_the_student_lists(tmp_path: Path) -> None:
    def size(outcomes: int, own: int) -> int:
        rollout = {"teacher_support": own}
        return rollout_bytes(make_config(tmp_path, rollout=rollout, termination={"teacher_top_k": outcomes}))

    assert size(8, 8) == size(16, 0) > size(8, 0)


def test_what_is_written_may_grow_by_less(tmp_path: Any) -> None:
    config = make_config(tmp_path, rollout={"max_completion_length": 640, "chunk_tokens": 16})
    lengths = [growth_bytes(config, length) for length in range(0, 641, 16)]
    assert lengths[0] == rollout_bytes(config)
    assert lengths == sorted(lengths, reverse=True)
    assert growth_bytes(config, 640) > 0  # scores and verdict are still to come
    assert growth_bytes(config, 10**9) < lengths[0] / 2  # a record that was broken


def test_the_least_holds_a_batch_and_the_most_all_that_may_be_in_flight(tmp_path: Any) -> None:
    def config(**learner: int) -> Config:
        return make_config(
            tmp_path,
            learner={"batch_size": 8, "max_staleness": 2, "max_steps": 50, **learner},
            checkpoints={"every_steps": 5},
        )

    each = rollout_bytes(config())
    assert least_bytes(config()) - least_bytes(config(batch_size=7)) == each
    assert most_bytes(config()) - least_bytes(config()) == (2 + 1 + 5 - 1) * 8 * each
    assert most_bytes(config(weight_sync_steps=3)) - least_bytes(config()) == (3 * (2 + 1) + 5 - 1) * 8 * each
    assert most_bytes(config(max_steps=1)) == least_bytes(config(max_steps=1))
    assert ALLOWED_SHARE * (maxmemory_mb(least_bytes(config())) << 20) >= least_bytes(config())


def test_no_limit_is_room_without_end() -> None:
    assert free_bytes({"used_memory": 10**9, "maxmemory": 0}) == float("inf")
    assert free_bytes({"used_memory": 80, "maxmemory": 100}) == -5


@pytest.mark.parametrize(
    ("servers", "config"),
    [
        ("docker-compose.yml", "ops/experiments/demo.yaml"),
        ("ops/k8s/base/redis.yaml", "ops/k8s/base/experiments/cluster.yaml"),
    ],
)
def test_the_servers_that_ship_hold_what_the_configs_that_ship_with_them_need(servers: str, config: str) -> None:
    found = re.search(
        r'appendonly, "yes", --maxmemory, "?(?:\$\{KATANA_REDIS_MB:-)?(\d+)', (ROOT / servers).read_text()
    )
    assert found
    assert int(found[1]) >= maxmemory_mb(most_bytes(load(ROOT / config)))


@pytest.mark.parametrize("config", sorted((ROOT / "ops" / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_config_that_ships_has_to_wait_for_memory(config: Path) -> None:
    loaded = load(config)
    assert loaded.redis.maxmemory_mb >= maxmemory_mb(most_bytes(loaded))
