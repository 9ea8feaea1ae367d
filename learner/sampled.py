"""Losses on the sampled token alone: estimators of the KL between student and teacher, as functions of tensors.

N kept tokens. p is the student now, q the teacher, p_rollout the student that wrote, all at temperature 1; p_sampled is
p_rollout after temperature and top-p, with which the token was drawn. l = log p - log q of the sampled outcome.
"""

from __future__ import annotations

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
    cost = ratio * (log_p.detach() - teacher_sampled.clamp_min(LOG_FLOOR))
    return with_slope(cost, cost, log_p)
