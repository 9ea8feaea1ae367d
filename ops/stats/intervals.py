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

    prompts: that of each rollout, as numbers; at least one. One seed gives the same draws, so calls with the same
    prompts can be compared draw by draw. Efron, "Bootstrap methods: another look at the jackknife", 1979, with prompts
    as the units.
    """
    found, place = np.unique(np.asarray(prompts), return_inverse=True)
    count = len(found)
    table = np.stack([np.bincount(place, weights=column, minlength=count) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed)
    # In blocks: resamples × prompts of a long run would be gigabytes.
    block = max(1, _DRAWS_AT_ONCE // count)
    sums = []
    for begin in range(0, resamples, block):
        rows = range(begin, min(begin + block, resamples))
        # As rng.multinomial, in a tenth of its time.
        drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in rows]
        sums.append(np.array(drawn, dtype=np.float64) @ table)
    return np.concatenate(sums)


def interval(values: Reals) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of what was drawn."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def unseen_share(prompts: int) -> float:
    """The greatest share of all prompts that may be unlike the `prompts` seen, which were all alike, at 95 %.

    1 - 0.025^(1/prompts): for values of 0 or 1 the limit of Clopper and Pearson (Biometrika, 1934).
    """
    return float(1 - 0.025 ** (1 / prompts))


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """A 95 % interval of a share."""
    share, shrink = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


FEW_PROMPTS = 20
