"""The policies that look for a change of the mean along a rollout: of the teacher's margin, of the divergence."""

from __future__ import annotations

import numpy as np

from common.changes import AdaptiveWindow, Change, Cusum
from common.config import Termination
from common.policies.base import FromWarmup, ScoredTokens, Situation
from common.termination import Cut

_MOST_BLOCKS = 128  # a check costs as much however long the rollout is; what is older says little of the present


def _cut(change: Change | None, reason: str) -> Cut | None:
    return None if change is None else Cut(change.seen, change.before, reason)


class MarginChangePolicy(FromWarmup):
    """`margin_change`: cut at a change point of the teacher's margin, log q(x_t) - log p(x_t) of the sampled token.

    Our reading of a change point of the teacher's margin (arXiv 2605.13643): Page's cumulative sum, see
    `common.changes.Cusum`, against the mean of the first `window` margins after `grace_tokens`. `margin_side` fall:
    the teacher turns from what the student writes; rise: it begins to agree with all of it. Kept is what stands before
    the estimated change.
    """

    reads = frozenset({"student_logprobs", "teacher_logprobs"})
    key = "margin_threshold"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        self._rule = Cusum(
            grace=settings.grace_tokens,
            reference=settings.window,
            drift=settings.margin_drift,
            threshold=situation.number,
            rise=settings.margin_side == "rise",
        )

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.grace_tokens + settings.window + 2  # one token alone is no change

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        margin = tokens.teacher_logprobs.astype(np.float64) - tokens.student_logprobs
        return _cut(self._rule.feed(margin), "margin_change")


class AdaptivePolicy(FromWarmup):
    """`adaptive`: cut where the mean divergence has fallen for sure, by windows that adapt to the rollout.

    Our reading of adaptive windows (arXiv 2605.28396): ADWIN with Bernstein's bound, see
    `common.changes.AdaptiveWindow`. Kept is what stands before the split at which the newer part is lower than the
    older one. No threshold in nats and no calibration: a rollout is compared with itself.
    """

    key = "adaptive_delta"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        self._rule = AdaptiveWindow(
            grace=settings.grace_tokens,
            block=settings.adaptive_block,
            most_blocks=_MOST_BLOCKS,
            top=settings.adaptive_range,
            delta=situation.number,
        )

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.grace_tokens + 2 * settings.adaptive_block

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        return _cut(self._rule.feed(tokens.divergence), "adaptive")
