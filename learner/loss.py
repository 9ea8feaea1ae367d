"""The loss: reverse KL to the teacher, per kept token, as functions of tensors.

Shapes: N kept tokens, K the size of the support besides STOP. All logarithms are natural, all values in nats. The
vocabulary is reduced to these shapes before, in `learner.pieces`.

The objective is that of "Escaping the KL Agreement Trap in On-Policy Distillation" (arXiv 2606.09471), which is the
usual one of on-policy distillation: the KL divergence of the student's next-token distribution p from the teacher's q,
on the student's prefixes, at temperature 1. The stop ids of both models are one outcome, STOP; all outcomes outside
the support are one bucket, the tail.

Left out: a return-to-go (each token has only its own loss), and PPO's clipping of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from learner.batch import MicroBatch

LossMode = Literal["reverse_kl_topk_tail", "reverse_kl_sampled"]

LOG_FLOOR = -1e4
"""The lowest log-probability, here and on the wire: finite, so that 0 x log 0 is 0."""

_MAX_LOG_RATIO = 20.0
"""Bound of the log ratio, or the ratio could overflow; a ratio beyond e^20 is meaningless anyway."""


@dataclass(frozen=True, slots=True, eq=False)
class StudentOutcomes:
    """What the student makes of n kept tokens, in nats: all of its distribution that loss and diagnostics read.

    logprobs: [n, K+1], of STOP (column 0) and the recorded support. tail: [n], the log-sum-exp of all outcomes outside;
    None if there are none. sampled: [n], of the sampled outcome, STOP's if that is a stop id. These three may have
    gradients. entropy: [n], over all outcomes, STOP as one. overlap: [n], the share of the support's K outcomes that
    are among the student's K most probable ones besides STOP.
    """

    logprobs: Tensor
    tail: Tensor | None
    sampled: Tensor
    entropy: Tensor
    overlap: Tensor

    def leaves(self) -> StudentOutcomes:
        """The same values as leaves of a new graph, which backward gives a gradient each."""
        logprobs, sampled = (one.detach().requires_grad_() for one in (self.logprobs, self.sampled))
        tail = None if self.tail is None else self.tail.detach().requires_grad_()
        return replace(self, logprobs=logprobs, tail=tail, sampled=sampled)

    @classmethod
    def joined(cls, parts: Sequence[StudentOutcomes]) -> StudentOutcomes:
        """Those of all tokens, from those of some at a time, in their order."""
        tails = [part.tail for part in parts if part.tail is not None]
        return cls(
            logprobs=torch.cat([part.logprobs for part in parts]),
            tail=torch.cat(tails) if tails else None,
            sampled=torch.cat([part.sampled for part in parts]),
            entropy=torch.cat([part.entropy for part in parts]),
            overlap=torch.cat([part.overlap for part in parts]),
        )


def reverse_kl_topk_tail(
    logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None
) -> Tensor:
    """Return the reverse KL [N] between the coarse distributions: STOP, support, tail (arXiv 2606.09471).

        sum over S of p (log p - log q)  +  p_tail (log p_tail - log q_tail)

    logprobs [N, K+1] and tail [N] are the student's, with gradient; those of the teacher, of the
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

    log_p: [N], the student's log-probability of the sampled outcome now, with gradient.
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
    mode: LossMode, student: StudentOutcomes, micro_batch: MicroBatch, *, ratio_clip: float | None = None
) -> Tensor:
    """Return the loss of each kept token, [N], for a value of `loss.mode`.

    ratio_clip is only for `reverse_kl_sampled`: the other mode takes its expectation over outcomes, not over samples.
    The micro-batch's part of the batch's loss is `(micro_batch.weights * token_losses(...)).sum()`. A token's loss
    depends on its own outcomes alone. Raises ValueError for an unknown mode.
    """
    if mode == "reverse_kl_topk_tail":
        return reverse_kl_topk_tail(
            student.logprobs, student.tail, micro_batch.teacher_logprobs, micro_batch.teacher_tail
        )
    if mode == "reverse_kl_sampled":
        return reverse_kl_sampled(
            student.sampled, micro_batch.teacher_sampled, micro_batch.sampling_logprobs, ratio_clip=ratio_clip
        )
    raise ValueError(f"loss mode is {mode!r}, expected one of {', '.join(get_args(LossMode))}")


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
def diagnostics(student: StudentOutcomes, micro_batch: MicroBatch) -> Diagnostics:
    """Return the diagnostics of one micro-batch, in one transfer from the device."""
    kl = reverse_kl_topk_tail(student.logprobs, student.tail, micro_batch.teacher_logprobs, micro_batch.teacher_tail)
    ratio = importance_ratio(student.sampled, micro_batch.rollout_logprobs)
    means = [
        kl.mean(),
        student.entropy.mean(),
        student.logprobs.exp().sum(dim=1).mean(),
        micro_batch.teacher_logprobs.exp().sum(dim=1).mean(),
        student.overlap.mean(),
        ratio.mean(),
        ratio.max(),
    ]
    return Diagnostics(micro_batch.kept_tokens, *torch.stack(means).tolist())


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
