"""How many rollouts may be admitted, by numbers alone; what the feeder makes of them is in test_feeder.py."""

from __future__ import annotations

from typing import Any

import pytest

from actors import admission
from common.config import LearnerSettings

INVARIANT = (
    "rollouts are admitted only as far as writers have room, the learner can train on them before they are stale,\n"
    "and Redis can hold them until they are booked."
)
START = {"concurrency": 6, "running": 0, "open_rollouts": 0, "step": 0, "covered": 0}
BATCH = {"open_rollouts": 0, "judged": 0, "useful": 0, "useful_ended": 0, "trained": 0, "step": 0, "covered": 0}


def split(now: dict[str, int], max_steps: int) -> tuple[LearnerSettings, dict[str, int]]:
    """The learner's limits, by default 4 rollouts a batch and a staleness of 1 version of one step; and the rest."""
    limits = {"batch_size": 4, "max_staleness": 1, "weight_sync_steps": 1, "max_steps": max_steps}
    changed = {name: now[name] for name in limits if name in now}
    return LearnerSettings(**limits | changed), {name: now[name] for name in now if name not in limits}


def test_the_invariant_is_the_module_s() -> None:
    """The tables below go through its parts: writers and staleness, whole batches, memory."""
    assert f"Invariant: {INVARIANT}" in (admission.__doc__ or "")


@pytest.mark.parametrize(
    ("now", "count"),
    [
        ({}, 6),  # writers: 6 - 0
        ({"running": 6, "open_rollouts": 6}, 0),
        ({"running": 3, "open_rollouts": 6}, 2),  # staleness: (1 + 1) · 4 - 6
        ({"running": 3, "open_rollouts": 8}, 0),
        ({"running": 3, "open_rollouts": 12}, -4),  # a learner that fell back: too many are in flight
        ({"running": 2, "open_rollouts": 8, "step": 1}, 4),  # trained and not checkpointed: 8 - (8 - 4)
        ({"running": 2, "open_rollouts": 8, "step": 1, "covered": 1}, 0),
        ({"open_rollouts": 0, "step": 99, "covered": 99}, 4),  # the run's last batch
        ({"open_rollouts": 0, "step": 100, "covered": 100}, 0),  # it is over
        ({"concurrency": 100, "max_staleness": 9, "max_steps": 2}, 8),  # no more than the run can train
        ({"concurrency": 100, "weight_sync_steps": 3}, 24),  # two versions of three steps
        ({"concurrency": 100, "weight_sync_steps": 3, "step": 2, "covered": 2}, 16),  # two of this version are over
        ({"concurrency": 100, "weight_sync_steps": 3, "step": 3, "covered": 3}, 24),
        ({"concurrency": 100, "weight_sync_steps": 3, "max_staleness": 0, "step": 2, "covered": 2}, 4),
        ({"concurrency": 100, "weight_sync_steps": 3, "step": 97, "covered": 97}, 12),  # as many as the run can train
    ],
)
def test_places_by_writers_and_by_staleness(now: dict[str, int], count: int) -> None:
    limits, numbers = split(now, max_steps=100)
    assert admission.places(limits, **START | numbers) == count


@pytest.mark.parametrize(
    ("staleness", "sync", "mean", "long", "count"),
    [
        (4, 1, 100, 100, 96),  # all alike: 32 · (4 - 1)
        (4, 1, 100, 200, 48),  # the longest takes the time of two
        (8, 1, 100, 400, 56),
        (4, 1, 100, 1000, 32),  # at least a batch
        (0, 1, 100, 100, 32),
        (0, 4, 100, 100, 32),
        (1, 4, 100, 100, 64),  # 32 · (4 - 2): half of the version in which it begins is over
        (4, 4, 100, 100, 448),  # 32 · (16 - 2)
        (4, 1, 0, 0, 32),  # lengths of nothing
    ],
)
def test_the_longest_rollouts_are_trained_in_time(
    staleness: int, sync: int, mean: float, long: float, count: int
) -> None:
    limits = LearnerSettings(batch_size=32, max_staleness=staleness, weight_sync_steps=sync, max_steps=100)
    assert admission.in_time(limits, mean, long) == count


@pytest.mark.parametrize(
    ("now", "count"),
    [
        ({}, 4),  # the first batch
        ({"open_rollouts": 4, "judged": 3, "useful": 3}, 0),  # a verdict is outstanding
        ({"open_rollouts": 4, "judged": 4, "useful": 4}, 0),  # whole
        ({"open_rollouts": 4, "judged": 4, "useful": 1}, 3),  # three were empty or died
        ({"open_rollouts": 4, "judged": 4, "useful": 4, "step": 1}, 4),  # trained, not booked
        ({"trained": 4, "step": 1, "covered": 1}, 4),  # trained and booked
        ({"trained": 4, "step": 3, "covered": 1, "max_steps": 3}, 0),  # the run is over
        # Both checkpoints were torn: of 12 that count as trained 8 are lost, and 4 wait.
        ({"open_rollouts": 4, "judged": 4, "useful": 4, "trained": 8}, 0),
        ({"open_rollouts": 4, "judged": 4, "useful": 4, "useful_ended": 2, "trained": 8}, 2),
    ],
)
def test_the_rest_of_a_batch_in_a_deterministic_run(now: dict[str, int], count: int) -> None:
    limits, numbers = split(now, max_steps=10)
    assert admission.rest_of_batch(limits, **BATCH | numbers) == count


@pytest.mark.parametrize(
    ("now", "count"),
    [
        ({"free": 1000.0}, 8),  # all
        ({"free": 450.0}, 4),
        ({"free": 450.0, "growing": 200, "running": 2}, 2),  # what is being written needs its own first
        ({"free": 150.0, "growing": 200, "running": 2}, 0),
        ({"free": 50.0, "running": 0}, 1),  # nothing is being written: one may always come
        ({"free": -300.0, "running": 0}, 1),
        ({"free": 50.0, "running": 1}, 0),
        ({"free": float("inf"), "growing": 200, "running": 2}, 8),  # no limit
    ],
)
def test_what_fits_into_redis(now: dict[str, Any], count: int) -> None:
    assert admission.fitting(8, **({"running": 0, "growing": 0, "each": 100} | now)) == count
