"""The learning rate as a pure function of the step, so that a resumed learner needs no scheduler's state."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "constant"]


def learning_rate(step: int, *, base: float, schedule: Schedule, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Steps 0 ... warmup_steps - 1 rise linearly from base / warmup_steps to base (the first step is never
    lost on a rate of 0). From there `constant` stays, and `cosine` falls to 0 at max_steps along half a
    cosine (SGDR without restarts, arXiv 1608.03983); the last step of a run, max_steps - 1, still moves.
    Past max_steps cosine stays at 0, also where the warm-up is longer than the run.

    Raises ValueError for a negative step, warmup_steps or max_steps, and for another schedule.
    """
    for name, value in (("step", step), ("warmup_steps", warmup_steps), ("max_steps", max_steps)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0")
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(get_args(Schedule))}")
    if schedule == "cosine" and step >= max_steps:
        return 0.0
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))
