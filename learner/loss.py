"""The loss: reverse KL to the teacher, per kept token, as functions of tensors.

Shapes: N kept tokens, W the width of the model's logits, V the vocabulary both models share (V <= W), K
the size of the support besides STOP. All logarithms are natural, all values in nats.

The objective is that of "Escaping the KL Agreement Trap in On-Policy Distillation" (arXiv 2606.09471), which is the
usual one of on-policy distillation: the KL divergence of the student's next-token distribution p from the teacher's q,
on the student's prefixes, at temperature 1. The stop ids of both models are one outcome, STOP; all outcomes outside
the support are one bucket, the tail.

Left out: a return-to-go (each token has only its own loss), PPO's clipping of the gradient, and a fused head that
never materializes [N, V].
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.batch import MicroBatch

LossMode = Literal["reverse_kl_topk_tail", "reverse_kl_sampled"]

LOG_FLOOR = -1e4
"""The lowest log-probability, here and on the wire: finite, so that 0 x log 0 is 0."""

_MAX_LOG_RATIO = 20.0
"""Bound of the log ratio, or the ratio could overflow; a ratio beyond e^20 is meaningless anyway."""


class UncastHead(nn.Linear):
    """A linear layer with float32 weights that autocast does not cast: bfloat16 logits are rounded to 8 bits, which
    adds about 1e-3 nats to every divergence."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] of any float dtype; returns float32 [..., out], with gradients."""
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight, self.bias)


def keep_head_in_float32(model: Any) -> None:
    """Make the output head of a float32 model compute in float32 even under autocast, in place.

    A head that is not a plain `nn.Linear` has its own computation and is not changed, as in the engine.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = UncastHead  # change only the class: parameters, their names and ties stay


def kept_logits(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the logits [N, W] that predict the kept tokens, in the dtype of the model's head.

    The whole model is called, not trunk and head separately: some models scale or cap the logits after the head, in
    their own forward. With the mask as `logits_to_keep`, models of transformers select the rows *before* the head, so
    the full output [b, T, W], by far the largest tensor of a step, is never created. A model without that argument (or
    a wrapper that hides it) returns all logits, and the rows are selected from them: the same numbers, more memory.
    """
    mask = micro_batch.logit_mask
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = mask
    logits: Tensor = model(input_ids=micro_batch.input_ids, **options).logits
    return logits if logits.dim() == 2 else logits[mask]


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


def reverse_kl_topk_tail(
    logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None
) -> Tensor:
    """Return the reverse KL [N] between the coarse distributions: STOP, support, tail (arXiv 2606.09471).

        sum over S of p (log p - log q)  +  p_tail (log p_tail - log q_tail)

    logprobs [N, K+1] and tail [N] are the student's from `on_support`, with gradient; those of the teacher, of the
    same shapes, are detached and clamped at LOG_FLOOR. The result is never negative and never above the KL over all
    outcomes; it equals that if there is no tail (`_kl_terms` has the numerics).
    Raises ValueError if only one of them has a tail.
    """
    if (tail is None) != (teacher_tail is None):
        raise ValueError("student and teacher must both have a tail, or neither")
    terms = _kl_terms(logprobs, teacher_logprobs).sum(dim=1)
    if tail is None or teacher_tail is None:
        return terms
    return terms + _kl_terms(tail, teacher_tail)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q) - p + q per outcome.

    Over a whole distribution -p + q sums to 0, so the sum is the KL. But each term is >= 0, and errors of
    normalization (float32, of a large log-sum-exp, ~1e-6) have only a second-order effect. The plain terms
    have both signs and cancel: if p and q nearly agree (in a trap: 1e-4 nats), rounding dominates their sum,
    and it can be negative.
    """
    log_p = log_p.clamp_min(LOG_FLOOR)
    log_q = log_q.detach().clamp_min(LOG_FLOOR)
    p, ratio = log_p.exp(), log_p - log_q
    # Two forms of one function: expm1 is exact near p = q; for p << q it would be 0 x inf. Both must be finite
    # everywhere (hence the clamp): in the gradient, `where` multiplies the form that is not chosen by 0.
    near = p * (ratio + torch.expm1(-ratio.clamp_min(-1.0)))
    far = p * (ratio - 1.0) + log_q.exp()
    return torch.where(ratio > -1.0, near, far)


def importance_ratio(log_p: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Return rho = p / p_rollout [N] of the sampled outcomes, bounded by e^20, without gradient.

    With the probabilities with which the outcomes were sampled it is an importance weight; with those of the writer at
    temperature 1 it shows how far the student has moved since.
    """
    return (log_p.detach() - rollout_logprobs).clamp_max(_MAX_LOG_RATIO).exp()


def reverse_kl_sampled(
    log_p: Tensor, teacher_sampled: Tensor, sampling_logprobs: Tensor, *, ratio_clip: float | None = None
) -> Tensor:
    """Return per token [N] a surrogate whose gradient, -rho A grad log p, estimates that of the reverse KL.

    log_p: [N], the student's log-probability of the sampled outcome now, with gradient (`sampled_logprobs`).
    A = log q - log p, detached: the advantage. rho = p / p_sampled, detached: p at temperature 1, p_sampled as the
    outcome was sampled (`sampling_logprobs`), after temperature and top-p. So the estimate is unbiased at every
    temperature. Outcomes outside the top-p nucleus are never sampled: their share of the gradient is missing, and no
    weight can restore it. No return-to-go.
    ratio_clip: rho becomes min(rho, ratio_clip): truncated importance sampling (Ionides, J. Comput. Graph.
    Stat. 17(2), 2008), biased, with bounded variance. A token beyond the clip keeps its gradient, unlike
    in PPO.

    The value is rho (log p - log q): its mean over samples is the KL, so the logged loss is meaningful.
    Raises ValueError for ratio_clip <= 0.
    """
    if ratio_clip is not None and not ratio_clip > 0:
        raise ValueError(f"ratio_clip is {ratio_clip}, expected more than 0")
    log_p = log_p.clamp_min(LOG_FLOOR)
    ratio = importance_ratio(log_p, sampling_logprobs)
    if ratio_clip is not None:
        ratio = ratio.clamp_max(ratio_clip)
    advantage = teacher_sampled.detach().clamp_min(LOG_FLOOR) - log_p.detach()
    # exp(0) = 1 carries grad log p without touching the value.
    return -ratio * advantage * (log_p - log_p.detach()).exp()


def token_losses(
    mode: LossMode,
    outcomes: Tensor,
    micro_batch: MicroBatch,
    *,
    stop_ids: Sequence[int],
    ratio_clip: float | None = None,
) -> Tensor:
    """Return the loss of each kept token, [N], for a value of `loss.mode`.

    outcomes: [N, V] from `log_outcomes` with the same stop_ids. ratio_clip is only for `reverse_kl_sampled`:
    the other mode takes its expectation over outcomes, not over samples. The micro-batch's part of the
    batch's loss is `(micro_batch.weights * token_losses(...)).sum()`. Raises ValueError for an unknown mode.
    """
    if mode == "reverse_kl_topk_tail":
        logprobs, tail = _student_on_support(outcomes, micro_batch, stop_ids)
        return reverse_kl_topk_tail(logprobs, tail, micro_batch.teacher_logprobs, micro_batch.teacher_tail)
    if mode == "reverse_kl_sampled":
        log_p = sampled_logprobs(outcomes, micro_batch.targets, stop_ids)
        return reverse_kl_sampled(
            log_p, micro_batch.teacher_sampled, micro_batch.sampling_logprobs, ratio_clip=ratio_clip
        )
    raise ValueError(f"loss mode is {mode!r}, expected one of {', '.join(get_args(LossMode))}")


def _student_on_support(
    outcomes: Tensor, micro_batch: MicroBatch, stop_ids: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Return `on_support` for the support of the micro-batch."""
    has_tail = micro_batch.teacher_tail is not None
    return on_support(outcomes, micro_batch.support_ids, stop_ids[0], has_tail=has_tail)


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Figures of `tokens` kept tokens; in the means every token counts the same, whatever its weight.

    kl_nats: mean coarse reverse KL, in either loss mode.
    entropy_nats: mean entropy of the student over all outcomes (STOP as one).
    support_mass: mean probability of STOP and support together under the current student: the support was the top K
        of the student that sampled, and its mass falls as the current student moves away.
    support_mass_teacher: the same under the teacher: 1 - q_tail, 1 if there is no tail.
    topk_overlap: mean share of the K recorded outcomes that are among the current student's top K, STOP excluded in
        both: 1 for the student that sampled, lower the further the learner has moved from it.
    ratio_mean, ratio_max: p / p_rollout of the sampled outcomes, both at temperature 1: how far the student has moved
        from the one that sampled. (The weights of `reverse_kl_sampled` are p / p_sampled.)
    """

    tokens: int
    kl_nats: float
    entropy_nats: float
    support_mass: float
    support_mass_teacher: float
    topk_overlap: float
    ratio_mean: float
    ratio_max: float


@torch.no_grad()
def diagnostics(outcomes: Tensor, micro_batch: MicroBatch, *, stop_ids: Sequence[int]) -> Diagnostics:
    """Return the diagnostics of one micro-batch from outcomes [N, V], in one transfer from the device."""
    logprobs, tail = _student_on_support(outcomes, micro_batch, stop_ids)
    kl = reverse_kl_topk_tail(logprobs, tail, micro_batch.teacher_logprobs, micro_batch.teacher_tail)
    entropy = -(outcomes.exp() * outcomes.clamp_min(LOG_FLOOR)).sum(dim=1)
    log_p = sampled_logprobs(outcomes, micro_batch.targets, stop_ids)
    ratio = importance_ratio(log_p, micro_batch.rollout_logprobs)
    means = [
        kl.mean(),
        entropy.mean(),
        logprobs.exp().sum(dim=1).mean(),
        micro_batch.teacher_logprobs.exp().sum(dim=1).mean(),
        topk_overlap(outcomes, logprobs).mean(),
        ratio.mean(),
        ratio.max(),
    ]
    return Diagnostics(micro_batch.kept_tokens, *torch.stack(means).tolist())


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


def merged(parts: Sequence[Diagnostics]) -> Diagnostics:
    """Return a batch's diagnostics from those of its micro-batches. Raises ValueError if there are none."""
    tokens = sum(part.tokens for part in parts)
    if not tokens:
        raise ValueError("no tokens to take a mean over")

    def mean(name: str) -> float:
        return float(sum(part.tokens * getattr(part, name) for part in parts) / tokens)

    return Diagnostics(
        tokens=tokens,
        kl_nats=mean("kl_nats"),
        entropy_nats=mean("entropy_nats"),
        support_mass=mean("support_mass"),
        support_mass_teacher=mean("support_mass_teacher"),
        topk_overlap=mean("topk_overlap"),
        ratio_mean=mean("ratio_mean"),
        ratio_max=max(part.ratio_max for part in parts),
    )
