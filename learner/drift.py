"""Drift guards: figures of a batch that move when training runs off with itself, whatever the loss says.

None of them is trained on. They are of the trajectories that a step trains: a rollout that was cut at its first token
(dropped as `empty`) or came too late (`stale`) is in none of them; the books have those.
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
    """Of one batch; None where none of its trajectories can tell.

    repetition: mean over trajectories of `repetition`, of all tokens that were written and scored, kept or not.
    truncation_rate: share that ended at the length limit (finish reason `length`).
    cut_rate_treated, cut_rate_control: share in which the policy fired, applied or not, by arm; 0 while not active.
        Control rollouts are written to their end and judged by the same threshold: theirs is what the rule makes of
        whole rollouts. Where both rise step by step and repetition does not, it is the threshold that climbs.
    threshold: mean of the numbers they were judged by, in the policy's unit, over those that have one.
    """

    repetition: float
    truncation_rate: float
    cut_rate_treated: float | None
    cut_rate_control: float | None
    threshold: float | None


def drift_of(batch: Sequence[Trajectory]) -> Drift:
    """Return the figures of a batch of at least one trajectory; every trajectory counts alike."""
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
    """Return the share of a text that deflate saves, 0 <= r < 1: near 1 in a loop, near 0 in noise.

        max(0, 1 - deflated bytes / raw bytes)

    The raw bytes are the token ids one behind the other, each in as many bytes as vocab_size - 1 needs, the lowest
    first. They are deflated as zlib does by default, without its header and checksum, which would outweigh a short
    text. Ids that are few, or some of them frequent, save something too, and a longer text has more to repeat; another
    tokenizer gives other values for the same text: compare within one model alone.

    tokens: int32 [n], n >= 1, all below vocab_size.
    """
    width = (max(1, (vocab_size - 1).bit_length()) + 7) // 8
    raw = tokens.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return max(0.0, 1.0 - len(deflate.compress(raw) + deflate.flush()) / len(raw))
