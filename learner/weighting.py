"""Weights of kept tokens: baselines with which cutting is compared, and what papers propose beside it. Pure functions.

    uniform               all kept tokens have the same weight
    random_drop           a random share of the kept tokens, `retention`, counts, at any position: with `policy: none`
                          and the retention of a KAT run it trains on as many tokens as KAT, but not on the first ones
    position              the weight is 2^(-t / half_life), t = 0 at the first token: earlier tokens count more
    importance_position   the weight falls with what student and teacher have already disagreed on in this rollout
    entropy               the weight is H / (H + half), H the student's entropy on its support when it wrote the token,
                          in nats: tokens at which it was undecided count more (our reading of token importance, TIP,
                          arXiv 2604.14084)

A draw is a function of the run's seed, rollout and position: a repeated batch has the same weights.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from common.config import Loss
from learner.batch import Shares, Trajectory, uniform


def shares_of(settings: Loss, seed: int) -> Shares:
    """The shares for `loss.weighting` in a run with this seed."""
    if settings.weighting == "random_drop":
        return lambda trajectory: random_drop(trajectory, settings.retention, seed)
    if settings.weighting == "position":
        return lambda trajectory: by_position(len(trajectory.tokens), settings.position_half_life)
    if settings.weighting == "importance_position":
        return lambda trajectory: by_disagreement(trajectory, settings.importance_gamma)
    if settings.weighting == "entropy":
        return lambda trajectory: by_entropy(trajectory, settings.entropy_half)
    return uniform


def random_drop(trajectory: Trajectory, retention: float, seed: int) -> npt.NDArray[np.float64]:
    """1 with probability `retention` (0 … 1), else 0, independently for each kept token; float64 [n]."""
    key = hashlib.blake2b(f"{seed}:drop:{trajectory.rid}".encode(), digest_size=16).digest()
    # The raw numbers of Philox are the same in every version of numpy.
    raw = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(len(trajectory.tokens))
    return ((np.asarray(raw) >> np.uint64(11)) / 2.0**53 < retention).astype(np.float64)


def by_position(count: int, half_life: float) -> npt.NDArray[np.float64]:
    """2^(-t / half_life) for t = 0 … count - 1, float64 [count]; half_life in tokens, above 0."""
    return np.exp2(-np.arange(count) / half_life)


def by_disagreement(trajectory: Trajectory, gamma: float) -> npt.NDArray[np.float64]:
    """1 + gamma x (1 - the share of the rollout's disagreement before the token), float64 [n]: from 1 + gamma at the
    first token down to 1.

    A token's disagreement is |log q - log p_rollout| of the sampled outcome, over the kept tokens. This is our reading
    of IW-OPD (arXiv 2606.22600), where a weight depends on the accumulated discrepancy of both models and gamma is its
    amplification, 0.5; there it multiplies the advantages of a loss on sampled tokens, here it is the weight of any
    loss in the batch's mean. Without any disagreement all weights are 1 + gamma.
    """
    gaps = np.abs(trajectory.teacher_sampled.astype(np.float64) - trajectory.rollout_logprobs)
    before = np.cumsum(gaps) - gaps
    return 1.0 + gamma * (1.0 - before / (gaps.sum() or 1.0))


def by_entropy(trajectory: Trajectory, half: float) -> npt.NDArray[np.float64]:
    """H / (H + half), float64 [n], from 0 at no entropy to 1; half in nats, above 0. Raises ValueError for a trajectory
    without entropies."""
    if trajectory.entropy is None:
        raise ValueError(f"trajectory {trajectory.rid}: it has no entropies, which loss.weighting entropy reads")
    entropy = trajectory.entropy.astype(np.float64)
    return entropy / (entropy + half)
