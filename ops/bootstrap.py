"""The bootstrap by prompt: rollouts of one prompt hang together, so prompts are drawn, each with all its rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_DRAWS_AT_ONCE = 1_000_000
Reals = npt.NDArray[np.float64]


def resampled_sums(
    prompts: Sequence[int] | npt.NDArray[np.generic], columns: Reals, *, resamples: int = RESAMPLES, seed: int = 0
) -> Reals:
    """Sums of columns, float [rollouts, k], over prompts drawn with replacement: float [resamples, k].

    prompts: that of each rollout, as numbers. Efron, "Bootstrap methods: another look at the jackknife", 1979, with
    prompts as the units.
    """
    found, place = np.unique(np.asarray(prompts), return_inverse=True)
    table = np.zeros((len(found), columns.shape[1]))
    np.add.at(table, place, columns)
    rng, shares = np.random.default_rng(seed), np.full(len(table), 1 / len(table))
    # In blocks: resamples × prompts of a long run would be gigabytes.
    block = max(1, _DRAWS_AT_ONCE // len(table))
    sizes = [min(block, resamples - begin) for begin in range(0, resamples, block)]
    return np.concatenate([rng.multinomial(len(table), shares, size=size) @ table for size in sizes])


def interval(values: Reals) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of what was drawn."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
