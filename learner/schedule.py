"""The learning rate as a pure function of the run's progress, so that a resumed learner needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "constant"]


def learning_rate(step: int, *, base: float, schedule: Schedule, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    In steps 0 ... warmup_steps - 1 the rate rises linearly from base / warmup_steps to base (so the first
    step has a rate above 0). After that `constant` stays at base, and `cosine` falls to 0 at max_steps along
    half a cosine (SGDR without restarts, arXiv 1608.03983); the last step of a run, max_steps - 1, has a rate
    above 0. From max_steps on cosine stays at 0, even if the warm-up is longer than the run.

    Raises ValueError for a negative step, warmup_steps or max_steps, and for an unknown schedule.
    """
    _check(schedule, step=step, warmup_steps=warmup_steps, max_steps=max_steps)
    if schedule == "cosine" and step >= max_steps:
        return 0.0
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    return base * _half_cosine((step - warmup_steps) / (max_steps - warmup_steps))


def learning_rate_by_tokens(
    generated: int, *, own: int, base: float, schedule: Schedule, warmup_ratio: float, max_tokens: int
) -> float:
    """Return the learning rate of the next step, after `generated` of at most `max_tokens` tokens were generated.

        g < w:      base * min(1, (g + own) / w)                    w = warmup_ratio * max_tokens
        constant:   base
        cosine:     base * (1 + cos(pi (g - w) / (max_tokens - w))) / 2,    0 from max_tokens on

    generated (g): as counted at the end of the previous step, 0 at the first step; corresponds to `step` in
    `learning_rate`. own: tokens generated in the rollouts of the step's batch; corresponds to the + 1 there, so the
    first step has a rate above 0.

    Raises ValueError for negative generated, own or max_tokens, for a warmup_ratio outside 0 <= r < 1, and for an
    unknown schedule.
    """
    _check(schedule, generated=generated, own=own, max_tokens=max_tokens)
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio is {warmup_ratio}, expected 0 <= r < 1")
    if schedule == "cosine" and generated >= max_tokens:
        return 0.0
    warmup = warmup_ratio * max_tokens
    if generated < warmup:
        return base * min(1.0, (generated + own) / warmup)
    if schedule == "constant":
        return base
    return base * _half_cosine((generated - warmup) / (max_tokens - warmup))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _check(schedule: Schedule, **counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(get_args(Schedule))}")
