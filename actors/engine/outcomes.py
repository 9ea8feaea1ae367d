"""Distributions over outcomes.

An outcome is a token, except that all stop ids U are one outcome, STOP: a base student may end with one token
and an instruct teacher with another, and that is agreement (docs: KAT, divergence). STOP lives in the column
of `stop_ids[0]`; the columns of the other stop ids hold -inf, and nothing else does: whatever else has no
probability holds `FLOOR_NATS`, so that every number that leaves for the wire is finite.

Functions of tensors. N rows, V outcomes' columns, K outcomes in the support besides STOP. With a vocabulary of 151,936
a matrix [N, V] is what takes memory, so the last function to read one overwrites it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.footprint import TEACHER_PIECE_ROWS

FLOOR_NATS = -1e4
"""The least log-probability: exp of it is 0 in float32 and float64 alike, and it is finite on the wire."""

PIECE_ROWS = TEACHER_PIECE_ROWS

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_stop_ids(stop_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError unless U is not empty, without repetition, within the vocabulary and not all of
    it."""
    distinct = set(stop_ids)
    if not 0 < len(distinct) < vocab_size or len(distinct) < len(stop_ids):
        raise ValueError(f"stop_ids {stop_ids}: at least one id, each once, and not the whole vocabulary")
    if min(distinct) < 0 or max(distinct) >= vocab_size:
        raise ValueError(f"stop_ids {stop_ids}: ids lie in 0..{vocab_size - 1}")


def support_size(k: int, vocab_size: int, stop_count: int) -> int:
    """K: how many outcomes besides STOP a support of at most `k` holds."""
    return min(k, vocab_size - stop_count)


def log_outcomes(logits: Tensor, stop_ids: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    """Log-probabilities of outcomes, at temperature 1 and before any truncation.

    `logits` [N, W] of any float dtype, W >= vocab_size: what an output head is padded with beyond the
    vocabulary has no probability. `stop_ids` int64 [U] is U, without repetition. Returns float32 [N,
    vocab_size].
    """
    out = logits[:, :vocab_size].float().log_softmax(dim=-1).clamp_(min=FLOOR_NATS)
    stops = torch.as_tensor(stop_ids, dtype=torch.int64, device=logits.device)
    if len(stops) > 1:
        stop = out.index_select(1, stops).logsumexp(dim=1, keepdim=True)
        out.index_fill_(1, stops, -torch.inf)
        out.index_copy_(1, stops[:1], stop)
    return out


def student_support(
    log_outcomes: Tensor, stop_id: int, k: int, *, stop_count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The student's most probable outcomes, and the mass of all the others.

    `log_outcomes` [N, V] as made by the function of that name, `stop_id` STOP's column, `stop_count` |U|.
    Returns `support_ids` int64 [N, K], the top K = support_size(...) outcomes besides STOP, most probable
    first; `support_logprobs` float32 [N, K+1], column 0 STOP's; and `tail_logprobs` float32 [N], the log of
    the mass outside the support, or None where there is nothing outside (V - |U| <= K). Overwrites `log_outcomes`.
    """
    vocab_size = log_outcomes.shape[1]
    size = support_size(k, vocab_size, stop_count)
    stop = log_outcomes[:, stop_id, None].clone()
    log_outcomes[:, stop_id] = -torch.inf
    top, ids = log_outcomes.topk(size, dim=1)
    logprobs = torch.cat([stop, top], dim=1)
    if vocab_size - stop_count <= size:
        return ids, logprobs, None
    return ids, logprobs, _tail(log_outcomes, ids)


def on_support(
    log_outcomes: Tensor, support_ids: Tensor, stop_id: int, *, stop_count: int
) -> tuple[Tensor, Tensor | None]:
    """Another model's log-probabilities on the student's support.

    `log_outcomes` [N, V], `support_ids` int64 [N, K]. Returns float32 [N, K+1], column 0 STOP's, and the log
    of the mass outside, float32 [N], or None where there is nothing outside. Overwrites `log_outcomes`: what is
    outside stays (see `beside_support`), all else is -inf.
    """
    logprobs = torch.cat([log_outcomes[:, stop_id, None], log_outcomes.gather(1, support_ids)], dim=1)
    if log_outcomes.shape[1] - stop_count <= support_ids.shape[1]:
        return logprobs, None
    log_outcomes[:, stop_id] = -torch.inf
    return logprobs, _tail(log_outcomes, support_ids)


def beside_support(rest: Tensor, k: int, left: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The k most probable of the `left` outcomes outside a support, k <= left, and the mass of all others.

    `rest` [N, V] as `on_support` leaves it where there is a tail. Returns ids int64 [N, k], most probable first; their
    log-probabilities float32 [N, k]; and the log of the mass outside both, float32 [N], None where nothing is left.
    Overwrites `rest`.
    """
    top, ids = rest.topk(k, dim=1)
    return ids, top, None if k == left else _tail(rest, ids)


def _tail(rest: Tensor, support_ids: Tensor) -> Tensor:
    """log of the mass in `rest` [N, V] outside `support_ids`; overwrites `rest`.

    A log-sum-exp over what is there, never 1 - sum of what is not: that difference of rounded numbers is zero
    or negative in up to half of the sharp cases.
    """
    rest.scatter_(1, support_ids, -torch.inf)
    return rest.logsumexp(dim=1).clamp_(min=FLOOR_NATS)


def sample(log_outcomes: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One outcome a row, by inverse CDF: the same uniform always gives the same outcome.

    `log_outcomes` [N, V], `uniforms` float64 [N] in [0, 1). Temperature applies to outcomes (STOP as one of
    them) and 0 means the most probable one; the nucleus is the smallest set of outcomes with mass >= top_p,
    at least one. Returns `outcome` int64 [N] and its log-probability as sampled, after temperature and
    truncation, float32 [N].
    """
    if temperature == 0:
        outcome = log_outcomes.argmax(dim=1)
        return outcome, torch.zeros_like(log_outcomes[:, 0])
    warm = log_outcomes if temperature == 1 else (log_outcomes / temperature).log_softmax(dim=1)
    if top_p >= 1:
        outcome = _invert(warm.exp().cumsum(dim=1, dtype=torch.float64), uniforms)
        return outcome, warm.gather(1, outcome[:, None])[:, 0]
    ordered, order = warm.sort(dim=1, descending=True, stable=True)
    mass = ordered.double().exp()
    before = mass.cumsum(dim=1) - mass
    # The first is kept by name: with top_p = 0 no mass before it would be small enough.
    before[:, 0] = -1.0
    cdf = mass.masked_fill_(before >= top_p, 0.0).cumsum(dim=1)
    place = _invert(cdf, uniforms)[:, None]
    nucleus = cdf[:, -1].log()
    return order.gather(1, place)[:, 0], (ordered.gather(1, place)[:, 0] - nucleus).float()


def _invert(cdf: Tensor, uniforms: Tensor) -> Tensor:
    """The first column of `cdf` float64 [N, V] beyond `uniforms` [N] of its total: int64 [N].

    Strictly beyond, so a column without mass is never met. No float64 below 1 times the total rounds up to the
    total, so there is such a column.
    """
    found = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    # Out of range only where the row is not a number: the caller sees that in the log-probability, not as a crash.
    return found.clamp_(max=cdf.shape[1] - 1)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[Any]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): a function of nothing else, so a resumed rollout goes
    on alike.

    `seeds` uint64 [N], `positions` int [N]. The generator is splitmix64 (Steele, Lea & Flood, OOPSLA 2014) at
    counter `position` from a hashed seed; without that hash, seeds that differ by its increment would share
    their draws.
    """
    # uint64 arrays wrap around silently: arithmetic modulo 2**64 is what is meant.
    state = _mix(seeds + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits = _mix(state) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit moves every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
