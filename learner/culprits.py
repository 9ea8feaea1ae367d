"""A step that cannot be taken: whose fault it is, found without a change to anything.

What is tried is given as a function: gradients of some trajectories, thrown away again; it says why there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from learner.batch import Trajectory
from learner.intake import Received

Attempt = Callable[[Sequence[Received]], str]


class StepImpossible(RuntimeError):
    """No step can be taken, and no trajectory is to blame."""


def culprits(batch: Sequence[Received], why_not: Attempt) -> list[tuple[Received, str]]:
    """Those that fail by themselves, with the reason: of a part that fails, each half is tried.

    Empty where the whole fails and every part of it passes.
    """
    if not batch or not (reason := why_not(batch)):
        return []
    if len(batch) == 1:
        return [(batch[0], reason)]
    middle = len(batch) // 2
    return culprits(batch[:middle], why_not) + culprits(batch[middle:], why_not)


def witness(like: Trajectory) -> Trajectory:
    """A trajectory that any learner in order can be trained on: the prompt's first token and one more, as likely as all
    others to its writer and to its teacher."""
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
        generated=0,
    )
