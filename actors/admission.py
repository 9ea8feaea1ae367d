"""Admission: how many rollouts may be admitted now, from numbers alone.

Invariant: no rollout is admitted beyond what writers can take up, the learner can train on before it is stale, and
Redis can hold until it is booked.
"""

from __future__ import annotations

from common.config import LearnerSettings


def places(
    limits: LearnerSettings, *, concurrency: int, running: int, open_rollouts: int, step: int, covered: int
) -> int:
    """min(concurrency - running, (max_staleness + 1) · batch - waiting - running), but no more than the run can train.

    `running`: rollouts without a verdict; `open_rollouts`: admitted and not booked; `covered`: step of the checkpoint.
    What was trained since the checkpoint is open, and neither waiting nor running. Counted so, and not from the sum of
    all ever trained, the number stays right when a learner goes back to an older checkpoint. Below 1: none.
    """
    usable = min(limits.max_staleness + 1, limits.max_steps - step) * limits.batch_size
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
    """Deterministic runs: (step + 1) · batch - (trained + waiting); 0 while a verdict is outstanding. Below 1: none.

    Of the open rollouts `judged` have a verdict or have ended; of those `useful` are, or will be, trained, and of
    these `useful_ended` have ended. `trained`: those booked so.
    """
    if judged < open_rollouts or step >= limits.max_steps:
        return 0
    # Trained after a checkpoint that the learner has fallen back from: anew. None where no checkpoint was torn.
    lost = max(0, trained + useful_ended - covered * limits.batch_size)
    return (step + 1) * limits.batch_size - (trained + useful - lost)


def fitting(count: int, *, running: int, free: float, growing: float, each: int) -> int:
    """How many of `count` more Redis has room for, so that they and all that are being written can be finished.

    In bytes: `free` may still be taken, `growing` of it by the `running` rollouts; `each` new one comes to as much.
    Where nothing is being written one may always come: what waits can then be no more than too few for a batch, and
    whatever else fills Redis is none of ours.
    """
    return max(0 if running else 1, int(min(count, (free - growing) / each)))
