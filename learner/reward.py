"""The reward's term of the loss: a policy gradient on the sampled tokens, beside the distillation loss."""

from __future__ import annotations

from torch import Tensor

from learner.batch import MicroBatch
from learner.divergences import LOG_FLOOR
from learner.loss import StudentOutcomes
from learner.sampled import importance_ratio


def reward_losses(
    student: StudentOutcomes, micro_batch: MicroBatch, weight: float, *, ratio_clip: float | None = None
) -> Tensor:
    """Return per kept token [N] a surrogate whose gradient is -weight rho A grad log p: REINFORCE with the advantages
    of `common.groups`, off-policy.

    rho = p / p_sampled of the sampled outcome (a stop id's is STOP's), detached, as in `reverse_kl_sampled`: p at
    temperature 1, p_sampled as it was sampled, so the term is right at every temperature. ratio_clip: rho becomes
    min(rho, ratio_clip), as there. GRPO's clipping of the surrogate (arXiv 2402.03300, equation 3) is left out: it
    bounds several steps on the same rollouts, and here each is trained on once.

    The value is -weight rho A. Raises ValueError for ratio_clip <= 0.
    """
    if ratio_clip is not None and not ratio_clip > 0:
        raise ValueError(f"ratio_clip is {ratio_clip}, expected more than 0")
    log_p = student.sampled.clamp_min(LOG_FLOOR)
    ratio = importance_ratio(log_p, micro_batch.sampling_logprobs)
    if ratio_clip is not None:
        ratio = ratio.clamp_max(ratio_clip)
    # exp(0) = 1 carries grad log p without touching the value.
    return -weight * ratio * micro_batch.advantages * (log_p - log_p.detach()).exp()
