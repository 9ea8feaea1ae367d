"""Divergences of student and teacher at one token, as functions of tensors: reverse KL, forward KL, JSD, a mixture.

All are taken between the coarse distributions: STOP, the support, and one bucket of all outcomes outside, the tail.
Between coarse distributions each of them is never negative, never above its value over all outcomes, and equal to it if
there is no tail (all four are f-divergences, which do not grow when outcomes are put together).

N kept tokens, K outcomes of the support besides STOP. Natural logarithms, values in nats. p is the student, with
gradient, q the teacher, without. The value and the gradient by log p are computed per outcome, each in a form in which
nothing cancels; no derivative goes through the other functions used here, so none of them can give NaN in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LOG_FLOOR = -1e4
"""The lowest log-probability, here and on the wire: finite, so that 0 x log 0 is 0."""

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From log p and log q, both finite: the part of each outcome in a divergence, and its derivative by log p."""


def reverse_kl_topk_tail(
    logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None
) -> Tensor:
    """Return the reverse KL [N], sum of p (log p - log q) over STOP, support and tail (arXiv 2606.09471).

    logprobs [N, K+1] and tail [N] are the student's, with gradient; those of the teacher, of the
    same shapes, are detached and clamped at LOG_FLOOR.
    Raises ValueError if only one of them has a tail.
    """
    return _coarse(_reverse, logprobs, tail, teacher_logprobs, teacher_tail)


def forward_kl_topk_tail(
    logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None
) -> Tensor:
    """Return the forward KL [N], sum of q (log q - log p) over STOP, support and tail. Arguments as of the reverse KL.

    What the teacher thinks likely and the support does not list is in its tail, where only the total counts: the loss
    is the KL over all outcomes less q_tail KL(q within the tail, p within the tail).
    """
    return _coarse(_forward, logprobs, tail, teacher_logprobs, teacher_tail)


def jsd_topk_tail(
    logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None, *, beta: float
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence [N] (GKD, arXiv 2306.13649). Arguments as of the reverse KL.

        JSD(beta) = beta KL(q, m) + (1 - beta) KL(p, m),  m = beta q + (1 - beta) p,  0 < beta < 1

    For beta -> 0 it goes to beta KL(q, p), for beta -> 1 to (1 - beta) KL(p, q): divided by beta and by 1 - beta, the
    forward and the reverse KL. At the ends it would be 0 and teach nothing; there it is the forward KL (beta 0) and the
    reverse KL (beta 1) themselves, as in TRL's GKDTrainer. So near the ends the loss is small, and at them it is not.
    Raises ValueError for a beta outside [0, 1], and as the reverse KL.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, expected 0 to 1")
    if beta in (0, 1):
        return _coarse(_reverse if beta else _forward, logprobs, tail, teacher_logprobs, teacher_tail)
    return _coarse(partial(_jsd, beta=beta), logprobs, tail, teacher_logprobs, teacher_tail)


def mixed_kl_topk_tail(
    logprobs: Tensor,
    tail: Tensor | None,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor | None,
    *,
    forward_weight: float,
) -> Tensor:
    """Return forward_weight x the forward KL + (1 - forward_weight) x the reverse KL, [N]. Other arguments as there.

    Raises ValueError for a forward_weight outside [0, 1], and as the reverse KL.
    """
    if not 0 <= forward_weight <= 1:
        raise ValueError(f"forward_weight is {forward_weight}, expected 0 to 1")

    def terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        (forward, its_slope), (reverse, other_slope) = _forward(log_p, log_q), _reverse(log_p, log_q)
        return forward.lerp(reverse, 1 - forward_weight), its_slope.lerp(other_slope, 1 - forward_weight)

    return _coarse(terms, logprobs, tail, teacher_logprobs, teacher_tail)


def with_slope(value: Tensor, slope: Tensor, log_p: Tensor) -> Tensor:
    """Return `value`, whose derivative by `log_p` is `slope`; log_p is finite."""
    return value.detach() + slope.detach() * (log_p - log_p.detach())


def _coarse(
    terms: Terms, logprobs: Tensor, tail: Tensor | None, teacher_logprobs: Tensor, teacher_tail: Tensor | None
) -> Tensor:
    """Sum the terms over STOP, support and tail."""
    if (tail is None) != (teacher_tail is None):
        raise ValueError("student and teacher must both have a tail, or neither")
    total = _sum(terms, logprobs, teacher_logprobs)
    if tail is None or teacher_tail is None:
        return total
    return total + _sum(terms, tail[:, None], teacher_tail[:, None])


def _sum(terms: Terms, log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p, log_q = log_p.clamp_min(LOG_FLOOR), log_q.detach().clamp_min(LOG_FLOOR)
    with torch.no_grad():
        value, slope = terms(log_p, log_q)
    return with_slope(value, slope, log_p).sum(dim=1)


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    ratio = log_p - log_q
    return _kl(log_p, log_q, ratio), log_p.exp() * ratio


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    ratio = log_q - log_p
    return _kl(log_q, log_p, ratio), -_difference(log_q, log_p, ratio)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    # m over the greater of p and q: log((1 - c) + c e^least), c the other's share in m. Two forms: log1p is exact near
    # p = q, logaddexp where p and q are far apart, also if 1 - c is below float32's rounding of 1.
    gap = log_q - log_p
    least, teachers = -gap.abs(), gap < 0  # whether the teacher's is the smaller, so that c is beta

    def share(students: float, if_teachers: float) -> Tensor:
        return torch.full_like(gap, students).masked_fill_(teachers, if_teachers)

    near = torch.log1p(share(1 - beta, beta) * torch.expm1(least))
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    far = torch.logaddexp(share(log_beta, log_rest), share(log_rest, log_beta) + least)
    over_greater = torch.where(least > -1.0, near, far)
    over_p, over_q = over_greater + gap.clamp_min(0.0), over_greater - gap.clamp_max(0.0)
    log_m = log_p + over_p
    value = beta * _kl(log_q, log_m, -over_q) + (1 - beta) * _kl(log_p, log_m, -over_p)
    return value, (beta - 1) * log_p.exp() * over_p


def _kl(log_p: Tensor, log_q: Tensor, ratio: Tensor) -> Tensor:
    """Return p (log p - log q) - p + q per outcome; ratio is log p - log q.

    Over a whole distribution -p + q sums to 0, so the sum is the KL. But each term is >= 0, and errors of
    normalization (float32, of a large log-sum-exp, ~1e-6) have only a second-order effect. The plain terms
    have both signs and cancel: if p and q nearly agree (in a trap: 1e-4 nats), rounding dominates their sum,
    and it can be negative.
    """
    p = log_p.exp()
    # Two forms of one function: expm1 is exact near p = q; for p << q it would be 0 x inf.
    near = p * (ratio + torch.expm1(-ratio.clamp_min(-1.0)))
    far = p * (ratio - 1.0) + log_q.exp()
    return torch.where(ratio > -1.0, near, far)


def _difference(log_p: Tensor, log_q: Tensor, ratio: Tensor) -> Tensor:
    """Return p - q per outcome, exact near p = q; ratio is log p - log q."""
    near = -log_p.exp() * torch.expm1(-ratio.clamp(-1.0, 1.0))
    return torch.where(ratio.abs() < 1.0, near, log_p.exp() - log_q.exp())
