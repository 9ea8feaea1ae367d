"""Losses on the sampled token alone: `loss.estimator`, as functions of tensors.

N kept tokens. p is the student now, with gradient, q the teacher, p_rollout the student that wrote, all at temperature
1; p_sampled is p_rollout after temperature and top-p, with which the token was drawn. Of the sampled outcome,
l = log p - log q, and rho = p / p_sampled. Each loss is a value for the books and a slope, both detached: the
gradient of a token's loss is slope x grad log p.

    estimator  value                 slope                  the slope's mean, over what is sampled, is the gradient of
    k1         rho l                 rho l                  the reverse KL
    k2         rho l^2 / 2           rho l                  the reverse KL: the same numbers as k1
    k3         rho (1/e^l - 1 + l)   rho (1 - 1/e^l)        the forward KL
    clipped    as k1                 0 beyond the clip      the reverse KL, where nothing is clipped

k1, k2, k3 are Schulman's (joschu.net/blog/kl-approx.html). As values k1 and k3 are unbiased, k2 is not. As losses it is
otherwise, because a loss is differentiated with the sample held fixed: the gradient of k1 so taken has mean 0, that of
k2 is the reverse KL's, that of k3 the forward KL's (arXiv 2506.09477, 2512.21852). So k1 is not differentiated here
but weighs grad log p, the score, and k2 differs from it in its value alone. All of this holds for any p_sampled with
the support of p, thanks to rho. Outcomes outside a top-p nucleus are never sampled: their share of the gradient is
missing, and no weight can restore it.

`to_go` is what the later tokens of the rollout cost (`learner.returns`): it is added to l in the slope of k1 and
clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.divergences import LOG_FLOOR, with_slope

_MAX_LOG_RATIO = 20.0
"""Bound of the log ratio, or the ratio could overflow; a ratio beyond e^20 is meaningless anyway."""


def importance_ratio(log_p: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """Return rho = p / p_rollout [N] of the sampled outcomes, bounded by e^20, without gradient.

    With the probabilities with which the outcomes were sampled it is an importance weight; with those of the writer at
    temperature 1 it shows how far the student has moved since.
    """
    return (log_p.detach() - rollout_logprobs).clamp_max(_MAX_LOG_RATIO).exp()


def k1_sampled(
    log_p: Tensor,
    teacher_sampled: Tensor,
    sampling_logprobs: Tensor,
    *,
    ratio_clip: float | None = None,
    to_go: Tensor | None = None,
) -> Tensor:
    """Return rho l per token [N], with slope rho (l + to_go): the score-function estimate of the reverse KL.

    log_p: [N], the student's log-probability of the sampled outcome now, with gradient. teacher_sampled,
    sampling_logprobs, to_go: [N], log q, log p_sampled, and the later tokens' cost; without it each token has only its
    own.
    ratio_clip: rho becomes min(rho, ratio_clip): truncated importance sampling (Ionides, J. Comput. Graph.
    Stat. 17(2), 2008), biased, with bounded variance. A token beyond the clip keeps its gradient, unlike
    in PPO.

    The mean of the value over samples is the KL, so the logged loss is meaningful. Raises ValueError for
    ratio_clip <= 0.
    """
    log_p, cost, rho = _cost(log_p, teacher_sampled, sampling_logprobs, ratio_clip)
    return with_slope(rho * cost, rho * (cost if to_go is None else cost + to_go), log_p)


def k2_sampled(
    log_p: Tensor, teacher_sampled: Tensor, sampling_logprobs: Tensor, *, ratio_clip: float | None = None
) -> Tensor:
    """Return rho l^2 / 2 per token [N], with slope rho l, that of k1. Arguments as there.

    The value is never negative; its mean differs from the KL by the third and higher powers of l.
    """
    log_p, cost, rho = _cost(log_p, teacher_sampled, sampling_logprobs, ratio_clip)
    return with_slope(rho * cost.square() / 2, rho * cost, log_p)


def k3_sampled(
    log_p: Tensor, teacher_sampled: Tensor, sampling_logprobs: Tensor, *, ratio_clip: float | None = None
) -> Tensor:
    """Return rho (q/p - 1 + l) per token [N], with slope rho (1 - q/p). Arguments as of k1.

    The value is never negative; q/p is bounded by e^20. The slope's mean is that of -q grad log p, since grad log p has
    mean 0: the gradient of KL(q, p), estimated on the student's own text.
    """
    log_p, cost, rho = _cost(log_p, teacher_sampled, sampling_logprobs, ratio_clip)
    excess = torch.expm1(-cost.clamp_min(-_MAX_LOG_RATIO))
    return with_slope(rho * (excess + cost), -rho * excess, log_p)


def clipped_sampled(
    log_p: Tensor,
    teacher_sampled: Tensor,
    sampling_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    clip_range: float,
    to_go: Tensor | None = None,
) -> Tensor:
    """Return PPO's clipped surrogate per token [N] (arXiv 1707.06347, eq. 7) for the advantage A = -(l + to_go).

        w max(s c, clip(s, 1 - clip_range, 1 + clip_range) c),  c = -A,  s = p / p_rollout,  w = p_rollout / p_sampled

    s w is rho. What is clipped is how far the student has moved since it wrote, both at temperature 1, and not what
    temperature and top-p put between them: text of the current student is never clipped. A is taken from the current
    student, not from the writer's, so that a token whose gap has closed meanwhile pulls no longer. A token for which
    the student has moved beyond the range in the direction of its advantage has no gradient: a bias, for less variance.
    In the value c is l alone. Other arguments as of k1. Raises ValueError unless 0 < clip_range < 1.
    """
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range is {clip_range}, expected more than 0 and less than 1")
    log_p, cost, rho = _cost(log_p, teacher_sampled, sampling_logprobs, None)
    whole = cost if to_go is None else cost + to_go
    moved = importance_ratio(log_p, rollout_logprobs)
    allowed = moved.clamp(1 - clip_range, 1 + clip_range)
    clipped = allowed * whole > moved * whole
    value = torch.where(clipped, allowed * importance_ratio(rollout_logprobs, sampling_logprobs), rho) * cost
    return with_slope(value, rho * whole * ~clipped, log_p)


def _cost(
    log_p: Tensor, teacher_sampled: Tensor, sampling_logprobs: Tensor, ratio_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p, finite and with its gradient; and l and rho without."""
    if ratio_clip is not None and not ratio_clip > 0:
        raise ValueError(f"ratio_clip is {ratio_clip}, expected more than 0")
    log_p = log_p.clamp_min(LOG_FLOOR)
    rho = importance_ratio(log_p, sampling_logprobs)
    if ratio_clip is not None:
        rho = rho.clamp_max(ratio_clip)
    return log_p, log_p.detach() - teacher_sampled.detach().clamp_min(LOG_FLOOR), rho
