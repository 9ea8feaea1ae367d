"""Logits a few rows at a time: reduced to what loss and diagnostics need, and turned into gradients at once.

A token's loss depends on its own row alone, and its weight in the batch's mean is known before. So the gradient of a
piece is complete as soon as its logits are there: nothing is kept for a backward pass and no product is computed twice.

Two matrices [rows of a piece, V] are all that is held. The first has the logits z, then the log-probabilities z - lse;
the second has exponentials, and in the end the gradient by z, in closed form. With the log-probability L of an outcome
o, a set of ids, dL/dz_v = [v in o] p_v / p_o - p_v, so for the gradients g by the outcomes' log-probabilities:

    d/dz_v = sum over the outcomes that hold v of g_o p_v / p_o  -  p_v sum over all outcomes of g_o
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.footprint import LEARNER_PIECE_ROWS
from learner.batch import MicroBatch
from learner.divergences import LOG_FLOOR
from learner.head import OutputHead
from learner.loss import StudentOutcomes

PIECE_ROWS = LEARNER_PIECE_ROWS

Losses = Callable[[StudentOutcomes, MicroBatch], Tensor]
"""The loss [n] of each of some kept tokens, differentiable by `logprobs`, `tail` and `sampled`."""


def backward_in_pieces(
    head: OutputHead,
    rows: Tensor,
    micro_batch: MicroBatch,
    losses: Losses,
    *,
    stop_ids: Sequence[int],
    vocab_size: int,
    students: int | None = None,
) -> tuple[Tensor, StudentOutcomes]:
    """Add the gradients of sum(weights * losses) over a micro-batch; returns that sum, and the student's outcomes [N].

    rows: [N, H] from `head.kept_rows`, with its graph. Logits, their reduction and their gradients are float32 (float64
    for a model in float64). students: how many ids of the support, the first ones, are the student's own; None: all.
    Raises ValueError if `stop_ids` is empty, has duplicates or ids outside the vocabulary.
    """
    _check(stop_ids, vocab_size)
    source = rows.detach()
    by_rows = torch.empty_like(source)
    most = min(PIECE_ROWS, len(source))
    wide = torch.promote_types(source.dtype, torch.float32)
    held = source.new_empty(2, most, vocab_size, dtype=wide)
    stops = torch.tensor(stop_ids, device=source.device)
    total, found = source.new_zeros((), dtype=wide), []
    for first in range(0, len(source), most):
        of_piece = slice(first, first + most)
        micro, piece_rows = micro_batch.only(of_piece), source[of_piece]
        logits, scratch = held[:, : len(piece_rows)]
        with torch.no_grad():
            head.logits(piece_rows, logits)
            piece = _Piece(logits, scratch, micro, stops, students)
        leaves = piece.outcomes.leaves()
        with torch.enable_grad():
            part = (micro.weights * losses(leaves, micro)).sum()
            part.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            total += part
            by_rows[of_piece] = head.backward(piece.gradient(leaves), piece_rows, piece.logits)
        found.append(piece.outcomes)
    if rows.requires_grad:
        rows.backward(by_rows)  # type: ignore[no-untyped-call]
    return total, StudentOutcomes.joined(found)


class _Piece:
    """The outcomes of n rows, from their logits [n, V], which are overwritten; `scratch` is of the same shape."""

    def __init__(self, logits: Tensor, scratch: Tensor, micro: MicroBatch, stops: Tensor, students: int | None) -> None:
        self._held, self._scratch, self._stops, self._ids = logits, scratch, stops, micro.support_ids
        self._targets, self._is_stop = micro.targets, torch.isin(micro.targets, stops)
        top = logits.amax(dim=1, keepdim=True)
        total = torch.sub(logits, top, out=scratch).exp_().sum(dim=1, keepdim=True)
        self._log_sum = total.log() + top
        logprobs = logits.sub_(self._log_sum).clamp_min_(LOG_FLOOR)
        entropy = -scratch.mul_(logprobs).sum(dim=1) / total[:, 0]  # of ids, the stop ids told apart

        self._of_stops = logprobs.index_select(1, stops)
        stop = self._of_stops.logsumexp(dim=1)
        entropy += (self._of_stops.exp() * self._of_stops).sum(dim=1) - stop.exp() * stop
        self._support = logprobs.gather(1, self._ids)
        sampled = torch.where(self._is_stop, stop, logprobs.gather(1, self._targets[:, None])[:, 0])

        logprobs.index_fill_(1, stops, -torch.inf)
        overlap = _overlap(logprobs, self._support[:, :students])
        logprobs.scatter_(1, self._ids, -torch.inf)
        # A log-sum-exp of what is outside, never log(1 - sum) of what is inside: with rounded values that difference
        # can be zero or negative if the distribution is sharp. With the floor, e^-10000 = 0, it is always finite.
        top = logprobs.amax(dim=1, keepdim=True).clamp_min(LOG_FLOOR)
        self._rest = torch.sub(logprobs, top, out=scratch).exp_().sum(dim=1, keepdim=True)
        self._tail = (self._rest.log() + top)[:, 0].clamp_min(LOG_FLOOR)
        self.outcomes = StudentOutcomes(
            logprobs=torch.cat([stop[:, None], self._support], dim=1),
            tail=None if micro.teacher_tail is None else self._tail,
            sampled=sampled,
            entropy=entropy,
            overlap=overlap,
        )

    def gradient(self, leaves: StudentOutcomes) -> Tensor:
        """Return the gradient [n, V] by the logits, from those by the outcomes in `leaves`; it takes the scratch."""
        by_logprobs, by_sampled = _gradient(leaves.logprobs), _gradient(leaves.sampled)
        by_tail = torch.zeros_like(by_sampled) if leaves.tail is None else _gradient(leaves.tail)
        by_all = (by_logprobs.sum(dim=1) + by_tail + by_sampled)[:, None]
        # The scratch is p_v / p_tail times `rest` in the tail, and 0 elsewhere.
        smallest = torch.finfo(self._rest.dtype).tiny
        of_tail = (by_tail[:, None] - self._tail.exp()[:, None] * by_all) / self._rest.clamp_min(smallest)
        gradient = self._scratch.mul_(of_tail)
        gradient.scatter_(1, self._ids, by_logprobs[:, 1:] - self._support.exp() * by_all)
        by_stop = by_logprobs[:, 0] + by_sampled * self._is_stop
        share = self._of_stops.softmax(dim=1) * (self._of_stops > LOG_FLOOR)
        gradient.index_copy_(1, self._stops, share * by_stop[:, None] - self._of_stops.exp() * by_all)
        gradient.scatter_add_(1, self._targets[:, None], (by_sampled * ~self._is_stop)[:, None])
        return gradient

    def logits(self) -> Tensor:
        """Return the logits once more, [n, V], in their memory."""
        self._held.scatter_(1, self._ids, self._support)
        self._held.index_copy_(1, self._stops, self._of_stops)
        return self._held.add_(self._log_sum)


def _overlap(logprobs: Tensor, support: Tensor) -> Tensor:
    """Return the share [n] of the recorded support [n, K] that is among the K most probable of `logprobs` [n, V], which
    has no stop ids. One that ties with the last of the K counts as one of them."""
    size = support.shape[1]
    if not size:
        return support.new_ones(len(support))
    last = logprobs.topk(size, dim=1).values[:, -1:]
    return (support >= last).to(support.dtype).mean(dim=1)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _check(stop_ids: Sequence[int], vocab_size: int) -> None:
    if not stop_ids or len(set(stop_ids)) != len(stop_ids) or not all(0 <= i < vocab_size for i in stop_ids):
        raise ValueError(f"stop_ids is {list(stop_ids)}, expected distinct ids below {vocab_size}")
