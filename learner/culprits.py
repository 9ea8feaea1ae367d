"""Finds the trajectories at fault when a step fails, without changing any state.

The caller passes the trial as a function: it computes the gradients of some trajectories, discards them, and returns
the reason if there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from learner.batch import Trajectory
from learner.intake import Received

Attempt = Callable[[Sequence[Received]], str]


class StepImpossible(RuntimeError):
    """No step is possible, and no trajectory is at fault."""


def culprits(batch: Sequence[Received], why_not: Attempt) -> list[tuple[Received, str]]:
    """The trajectories that fail alone, each with the reason, by trying each half of a failing part.

    Empty if the batch passes, or if it fails but its parts pass.
    """
    if not batch or not (reason := why_not(batch)):
        return []
    if len(batch) == 1:
        return [(batch[0], reason)]
    middle = len(batch) // 2
    return culprits(batch[:middle], why_not) + culprits(batch[middle:], why_not)


def witness(like: Trajectory) -> Trajectory:
    """A trajectory that any working learner can train on: the prompt's first token twice, with uniform probabilities of
    writer and teacher."""
    k = like.support_ids.shape[1]
    share = np.float32(-np.log(k + 2))
    return replace(
        like,
        rid="witness",
        prompt=like.prompt[:1],
        tokens=like.prompt[:1],
        support_ids=like.support_ids[:1],
        teacher_logprobs=np.full((1, k + 1), share),
        teacher_tail=None if like.teacher_tail is None else np.full(1, share),
        teacher_sampled=np.full(1, share),
        rollout_logprobs=np.full(1, share),
        sampling_logprobs=np.full(1, share),
        entropy=None if like.entropy is None else np.full(1, -share),
        generated=0,
        to_go=None,
        advantage=0.0,
    )
