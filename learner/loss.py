"""The loss of a batch's kept tokens by `loss.mode`, and the diagnostics beside it.

Shapes: N kept tokens, K the size of the support besides STOP. All logarithms are natural, all values in nats. The
vocabulary is reduced to these shapes before, in `learner.pieces`.

The objective is that of "Escaping the KL Agreement Trap in On-Policy Distillation" (arXiv 2606.09471), which is the
usual one of on-policy distillation: the KL divergence of the student's next-token distribution p from the teacher's q,
on the student's prefixes, at temperature 1; or another divergence of the two (`learner.divergences`), or an estimate
of it from the sampled token alone (`learner.sampled`). The stop ids of both models are one outcome, STOP; all outcomes
outside the support are one bucket, the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config import Loss
from learner.batch import MicroBatch
from learner.divergences import forward_kl_topk_tail, jsd_topk_tail, mixed_kl_topk_tail, reverse_kl_topk_tail
from learner.sampled import clipped_sampled, importance_ratio, k1_sampled, k2_sampled, k3_sampled


@dataclass(frozen=True, slots=True, eq=False)
class StudentOutcomes:
    """What the student makes of n kept tokens, in nats: all of its distribution that loss and diagnostics read.

    logprobs: [n, K+1], of STOP (column 0) and the recorded support. tail: [n], the log-sum-exp of all outcomes outside;
    None if there are none. sampled: [n], of the sampled outcome, STOP's if that is a stop id. These three may have
    gradients. entropy: [n], over all outcomes, STOP as one. overlap: [n], the share of the outcomes that were the
    student's K most probable ones besides STOP and are so now.
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


def token_losses(settings: Loss, student: StudentOutcomes, micro_batch: MicroBatch) -> Tensor:
    """Return the loss of each kept token, [N], as the config's section `loss` says.

    The micro-batch's part of the batch's loss is `(micro_batch.weights * token_losses(...)).sum()`. A token's loss
    depends on its own outcomes alone.
    """
    if settings.mode == "reverse_kl_sampled":
        return _sampled(settings, student.sampled, micro_batch)
    coarse = (student.logprobs, student.tail, micro_batch.teacher_logprobs, micro_batch.teacher_tail)
    if settings.mode == "forward_kl_topk_tail":
        return forward_kl_topk_tail(*coarse)
    if settings.mode == "jsd_topk_tail":
        return jsd_topk_tail(*coarse, beta=settings.beta)
    if settings.mode == "mixed":
        return mixed_kl_topk_tail(*coarse, forward_weight=settings.forward_weight)
    return reverse_kl_topk_tail(*coarse)


def _sampled(settings: Loss, log_p: Tensor, micro_batch: MicroBatch) -> Tensor:
    """By `loss.estimator`."""
    teacher, drawn, to_go = micro_batch.teacher_sampled, micro_batch.sampling_logprobs, micro_batch.to_go
    if settings.estimator == "clipped":
        written = micro_batch.rollout_logprobs
        return clipped_sampled(log_p, teacher, drawn, written, clip_range=settings.clip_range, to_go=to_go)
    if settings.estimator == "k2":
        return k2_sampled(log_p, teacher, drawn, ratio_clip=settings.ratio_clip)
    if settings.estimator == "k3":
        return k3_sampled(log_p, teacher, drawn, ratio_clip=settings.ratio_clip)
    return k1_sampled(log_p, teacher, drawn, ratio_clip=settings.ratio_clip, to_go=to_go)


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Figures of `tokens` kept tokens; in the means every token counts the same, whatever its weight.

    kl_nats: mean coarse reverse KL, in either loss mode.
    entropy_nats: mean entropy of the student over all outcomes (STOP as one).
    support_mass: mean probability of STOP and support together under the current student: the support was the top K
        of the student that sampled (and what the teacher added), and its mass falls as the current student moves away.
    support_mass_teacher: the same under the teacher: 1 - q_tail, 1 if there is no tail.
    topk_overlap: mean share of the K outcomes recorded by the student that are among its top K now, STOP excluded in
        both: 1 for the student that sampled, lower the further the learner has moved from it. Without what the
        teacher added.
    ratio_mean, ratio_max: p / p_rollout of the sampled outcomes, both at temperature 1: how far the student has moved
        from the one that sampled. (The weights of a sampled token's loss are p / p_sampled.)
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
