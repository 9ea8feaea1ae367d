"""Drift guards: figures of a batch that change when training degenerates, even if the loss looks good.

They are not in the loss. They cover the trajectories that a step trains on, not rollouts that were cut at their first
token (dropped as `empty`) or came too late (`stale`); those are in the books.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from learner.batch import Trajectory


@dataclass(frozen=True, slots=True)
class Drift:
    """Figures of one batch; None if no trajectory in it has the figure.

    repetition: mean over trajectories of `repetition`, of all tokens that were written and scored, kept or not.
    truncation_rate: share that ended at the length limit (finish reason `length`).
    cut_rate_treated, cut_rate_control: share in which the policy fired, applied or not, by arm; 0 while not active.
        Control rollouts are complete and judged by the same threshold, so their rate shows the policy on complete
        rollouts. If both rise and repetition does not, the threshold is rising.
    threshold: mean of the thresholds of the verdicts, in the policy's unit, over trajectories that have one.
    """

    repetition: float
    truncation_rate: float
    cut_rate_treated: float | None
    cut_rate_control: float | None
    threshold: float | None


def drift_of(batch: Sequence[Trajectory]) -> Drift:
    """Return the figures of a batch of at least one trajectory; all trajectories have the same weight."""
    return Drift(
        repetition=sum(one.repetition for one in batch) / len(batch),
        truncation_rate=sum(one.finish_reason == "length" for one in batch) / len(batch),
        cut_rate_treated=_mean([float(one.fired) for one in batch if one.arm == "treated"]),
        cut_rate_control=_mean([float(one.fired) for one in batch if one.arm == "control"]),
        threshold=_mean([one.threshold for one in batch if one.threshold is not None]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def repetition(tokens: npt.NDArray[np.int32], vocab_size: int) -> float:
    """Return the share by which deflate compresses a text, 0 <= r < 1: near 1 for a loop, near 0 for noise.

        max(0, 1 - deflated bytes / raw bytes)

    The raw bytes are the token ids in sequence, little-endian, each in as many bytes as vocab_size - 1 needs. They are
    deflated with zlib's defaults, without header and checksum, which would dominate in a short text. A few frequent ids
    and a longer text compress better too, and another tokenizer gives other values: compare only within one model.

    tokens: int32 [n], n >= 1, all below vocab_size.
    """
    width = (max(1, (vocab_size - 1).bit_length()) + 7) // 8
    raw = tokens.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return max(0.0, 1.0 - len(deflate.compress(raw) + deflate.flush()) / len(raw))
