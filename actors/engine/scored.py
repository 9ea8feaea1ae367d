"""What a scorer is asked and what it answers: chunks, and the teacher's log-probabilities of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A chunk to score.

    key: the rollout. prompt: int32 [m], m >= 1. start: index of the chunk's first token in the completion.
    tokens: int32 [n], n >= 1. support_ids: int32 [n, K]. prefix: int32 [start], the completion's tokens
    before the chunk, or None where `cached(key) == start` or start is 0.
    """

    key: str
    prompt: NDArray[np.int32]
    start: int
    tokens: NDArray[np.int32]
    support_ids: NDArray[np.int32]
    prefix: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class OwnSupport:
    """The K' outcomes that a teacher thinks likeliest outside the student's support, STOP excluded, likeliest first.

    ids: int32 [n, K']. logprobs: float32 [n, K']. tail_logprobs: float32 [n], of what is outside both, or None where
    nothing is.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Scored:
    """The teacher's scores of a chunk.

    teacher_logprobs: float32 [n, K+1] on the student's support, column 0 STOP's. tail_logprobs: float32 [n],
    or None where the support is everything. sampled: float32 [n], of the token that was drawn (of STOP where
    it is a stop id). own: the teacher's likeliest outcomes besides, where the scorer adds any.
    """

    key: str
    start: int
    teacher_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] | None
    sampled: NDArray[np.float32]
    own: OwnSupport | None = None
