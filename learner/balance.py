"""A batch dealt out to the learner's ranks: about equal tokens, and equally many micro-batches, for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from learner.batch import Denominator, MicroBatch, Shares, Trajectory, Weighted, grouped, uniform, weighted
from learner.culprits import witness


def balanced(
    trajectories: Sequence[Trajectory],
    ranks: int,
    *,
    max_tokens: int,
    denominator: Denominator = "kept",
    shares: Shares = uniform,
) -> list[list[MicroBatch]]:
    """Split a batch into the micro-batches of each rank; the arguments are those of `learner.batch.micro_batches`.

    The longest trajectory that is left goes to the rank with the fewest tokens so far (of several, the first): no rank
    has more than 4/3 of the tokens of the best split (Graham, SIAM J. Appl. Math. 17(2), 1969). All ranks have the same
    number of micro-batches, because each one is a collective operation: those of a rank that has fewer are filled up
    with micro-batches of two tokens and weight zero, which have no `rids`.

    The weights are those of the whole batch. The split depends only on the set of trajectories.
    """
    hands: list[list[Weighted]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in weighted(trajectories, denominator, shares):
        least = tokens.index(min(tokens))
        hands[least].append(row)
        tokens[least] += row[0].length
    parts = [grouped(hand, max_tokens) for hand in hands]
    most = max(map(len, parts))
    return [part + [_empty(trajectories[0])] * (most - len(part)) for part in parts]


def _empty(like: Trajectory) -> MicroBatch:
    """A micro-batch of weight zero, for a forward and a backward that add nothing."""
    [micro] = grouped([(witness(like), np.zeros(1))], max_tokens=2)
    return replace(micro, rids=())
