"""The loss's inputs from whole logits [N, W], by autograd: what `learner.pieces` is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.batch import MicroBatch
from learner.divergences import LOG_FLOOR
from learner.head import WholeHead
from learner.loss import StudentOutcomes


def kept_logits(model: Any, micro: MicroBatch) -> Tensor:
    """The model's own logits [N, W] for the kept tokens."""
    return WholeHead().kept_rows(model, micro)


def log_outcomes(logits: Tensor, stop_ids: Sequence[int], vocab_size: int) -> Tensor:
    """Return the log-probabilities [N, V] of all outcomes, from logits [N, W].

    Ids from vocab_size on are padding of the embedding and not outcomes. The stop ids are one outcome: its
    log-probability (their log-sum-exp) is in column stop_ids[0]; the columns of the other stop ids are -inf and pass
    no gradient. The result is float32: half precision is converted before the softmax (float64 stays float64).

    Raises ValueError if W < vocab_size, or if stop_ids is empty, has duplicates or ids outside the vocabulary.
    """
    if logits.shape[1] < vocab_size:
        raise ValueError(f"logits are {logits.shape[1]} wide, the vocabulary {vocab_size}")
    if not stop_ids or len(set(stop_ids)) != len(stop_ids) or not all(0 <= i < vocab_size for i in stop_ids):
        raise ValueError(f"stop_ids is {list(stop_ids)}, expected distinct ids below {vocab_size}")
    wide = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = wide.log_softmax(dim=1)
    if len(stop_ids) == 1:
        return logprobs
    ids = torch.tensor(stop_ids, device=logits.device)
    # With the floor the gradient of the log-sum-exp is finite even if a model gives all stop ids -inf.
    stop = logprobs.index_select(1, ids).clamp_min(LOG_FLOOR).logsumexp(dim=1, keepdim=True)
    return logprobs.index_fill(1, ids, -torch.inf).index_copy_(1, ids[:1], stop)


def on_support(outcomes: Tensor, support_ids: Tensor, stop_id: int, *, has_tail: bool) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities [N, K+1] of STOP (column 0) and support, and [N] of the tail or None.

    outcomes: [N, V] from `log_outcomes`; support_ids: int64 [N, K], distinct in a row, without stop ids;
    stop_id: the column of STOP; has_tail: False if STOP and support are all outcomes.

    The tail is the log-sum-exp of all outcomes outside the support, never log(1 - sum): with rounded values that
    difference can be zero or negative if the distribution is sharp.
    """
    stop_column = support_ids.new_full((support_ids.shape[0], 1), stop_id)
    columns = torch.cat([stop_column, support_ids], dim=1)
    logprobs = outcomes.gather(1, columns)
    if not has_tail:
        return logprobs, None
    # Overwritten by the floor, not by -inf: it adds e^-10000 = 0 to the sum, and the log-sum-exp and its gradient are
    # finite even in a row whose other outcomes are all -inf.
    return logprobs, outcomes.scatter(1, columns, LOG_FLOOR).logsumexp(dim=1)


def sampled_logprobs(outcomes: Tensor, targets: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Return the log-probabilities [N] of the sampled outcomes: that of STOP if the target is a stop id.

    outcomes: [N, V] from `log_outcomes` with the same stop_ids; targets: int64 [N].
    """
    is_stop = torch.isin(targets, torch.tensor(stop_ids, device=targets.device))
    columns = targets.masked_fill(is_stop, stop_ids[0])
    return outcomes.gather(1, columns[:, None])[:, 0]


def topk_overlap(outcomes: Tensor, logprobs: Tensor) -> Tensor:
    """Return the share [N] of the recorded support that is among the K most probable outcomes besides STOP.

    outcomes: [N, V] from `log_outcomes`; logprobs: [N, K+1] of STOP (column 0) and support, gathered from them. An
    outcome that ties with the last of the K counts as one of them.
    """
    support = logprobs[:, 1:]
    k = support.shape[1]
    top = outcomes.topk(k + 1, dim=1).values
    # If STOP is among the first K, the last of the other K is at position K + 1.
    last = torch.where(logprobs[:, 0] >= top[:, k - 1], top[:, k], top[:, k - 1])
    return (support >= last[:, None]).to(outcomes.dtype).mean(dim=1)


def whole_outcomes(logits: Tensor, micro: MicroBatch, stop_ids: Sequence[int], vocab_size: int) -> StudentOutcomes:
    """The student's outcomes, with a graph to the logits [N, W]."""
    outcomes = log_outcomes(logits, stop_ids, vocab_size)
    has_tail = micro.teacher_tail is not None
    logprobs, tail = on_support(outcomes, micro.support_ids, stop_ids[0], has_tail=has_tail)
    return StudentOutcomes(
        logprobs=logprobs,
        tail=tail,
        sampled=sampled_logprobs(outcomes, micro.targets, stop_ids),
        entropy=-(outcomes.exp() * outcomes.clamp_min(LOG_FLOOR)).sum(dim=1),
        overlap=topk_overlap(outcomes, logprobs),
    )
