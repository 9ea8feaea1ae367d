"""Return-to-go: what the later tokens of a rollout cost, for losses on the sampled token. Pure functions.

The reverse KL of whole texts is the expected sum of log p - log q over their tokens, and a token is to blame for what
comes after it: the exact gradient weighs grad log p of a token by its own cost and that of all later ones, the
return-to-go (arXiv 2506.09477 has the derivation). Without it (`loss.horizon: 0`) each position's KL is lowered where
the student stands, and how often the student gets there is taken as given.

The later costs are those of the writer, log p_rollout - log q, as they were recorded. So they are known before the
forward pass, and a token's loss goes on depending on its own outcomes alone: a batch can be computed a few rows at a
time. For text of the current student at temperature 1 this is exact. For older text it is the writer's return-to-go, as
in PPO, where advantages are the writer's too: to first order in how far the student has moved it is the same (the
exact weights would be products of all later ratios, whose variance grows with the length). At another temperature,
or with top_p below 1, the continuations are not the student's at temperature 1, and the return-to-go is of what was
sampled.

Only kept tokens count: what a cut left out has no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.config import Loss
from learner.batch import Trajectory


def with_returns(batch: Sequence[Trajectory], settings: Loss) -> list[Trajectory]:
    """The batch with `to_go` where the loss reads it."""
    if settings.mode != "reverse_kl_sampled" or settings.horizon == 0:
        return list(batch)
    return [replace(one, to_go=to_go(one, settings.horizon, settings.discount)) for one in batch]


def to_go(trajectory: Trajectory, horizon: int | str, discount: float) -> npt.NDArray[np.float32]:
    """The cost of the tokens after each kept one, float32 [n] nats: sum over k = 1 … horizon of discount^k cost[t + k].

    horizon: tokens, or "all" that were kept. A cost is log p_rollout - log q of the sampled outcome.
    """
    costs = trajectory.rollout_logprobs.astype(np.float64) - trajectory.teacher_sampled.astype(np.float64)
    later = np.zeros(len(costs))
    for place in range(len(costs) - 2, -1, -1):
        later[place] = discount * (costs[place + 1] + later[place + 1])
    if isinstance(horizon, int) and horizon < len(costs):
        later[:-horizon] -= discount**horizon * later[horizon:]
    return later.astype(np.float32)
