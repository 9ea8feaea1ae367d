"""Admission: how many rollouts may be admitted now. Pure functions of numbers.

Invariant: rollouts are admitted only as far as writers have room, the learner can train on them before they are stale,
and Redis can hold them until they are booked.
"""

from __future__ import annotations

from common.config import LearnerSettings


def in_time(limits: LearnerSettings, mean_length: float, long_length: float) -> int:
    """How many rollouts may be written at a time, so that one of `long_length` tokens is trained before it is stale.

    While it is written, others are completed at the pace of the mean one: running / batch · long / mean steps are
    made (Little's law), and it waits for up to one step more. At least a batch.
    """
    share = mean_length / max(mean_length, long_length, 1.0)
    return max(limits.batch_size, int(limits.batch_size * limits.steps_in_time * share))


def places(
    limits: LearnerSettings, *, concurrency: int, running: int, open_rollouts: int, step: int, covered: int
) -> int:
    """min(concurrency - running, steps · batch - waiting - running), but no more than the run can train.

    steps: as many as what begins now is not stale in: `fresh_steps`, less those of this version that are over.
    `running`: rollouts without a verdict; `open_rollouts`: admitted and not booked; `covered`: step of the checkpoint.
    Rollouts trained since the checkpoint are open, but neither waiting nor running. Counting from the checkpoint, not
    from all ever trained, stays right when a learner goes back to an older checkpoint. Below 1: admit none.
    """
    fresh = limits.fresh_steps - step % limits.weight_sync_steps
    usable = min(fresh, limits.max_steps - step) * limits.batch_size
    in_flight = open_rollouts - (step - covered) * limits.batch_size
    return min(concurrency - running, usable - in_flight)


def rest_of_batch(
    limits: LearnerSettings,
    *,
    open_rollouts: int,
    judged: int,
    useful: int,
    useful_ended: int,
    trained: int,
    step: int,
    covered: int,
) -> int:
    """Deterministic runs: (step + 1) · batch - (trained + waiting); 0 while a verdict is missing. Below 1: admit none.

    Of the open rollouts `judged` have a verdict or have ended; `useful` of those are or will be trained, and
    `useful_ended` of these have ended. `trained`: rollouts that are booked as trained.
    """
    if judged < open_rollouts or step >= limits.max_steps:
        return 0
    # Trained after the checkpoint to which the learner went back: not in the model any more. 0 unless one was torn.
    lost = max(0, trained + useful_ended - covered * limits.batch_size)
    return (step + 1) * limits.batch_size - (trained + useful - lost)


def fitting(count: int, *, running: int, free: float, growing: float, each: int) -> int:
    """How many of `count` more rollouts fit into Redis, so that they and all running ones can be completed.

    In bytes: `free` is unused, the `running` rollouts will need `growing` of it, a new one needs `each`. If none is
    running, one is always admitted: then fewer rollouts than a batch are waiting, and other data fills Redis.
    """
    return max(0 if running else 1, int(min(count, (free - growing) / each)))
