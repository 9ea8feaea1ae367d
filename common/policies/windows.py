"""The policies that look at window means: KAT, with its floor and its mirror."""

from __future__ import annotations

from typing import ClassVar, TypedDict

from common.config import Termination
from common.policies.base import Calibrated, FromWarmup, Policy, Situation
from common.termination import Kat


class WindowSettings(TypedDict):
    """The settings of `common.termination.Kat` that come from the config."""

    window: int
    patience: int
    stride: int
    grace_tokens: int


def windows(settings: Termination) -> WindowSettings:
    return {
        "window": settings.window,
        "patience": settings.patience,
        "stride": settings.stride,
        "grace_tokens": settings.grace_tokens,
    }


class OfWindows(Kat, Policy):
    """What the policies that look at window means have in common."""

    reason: ClassVar[str] = "kl_trap"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(**windows(settings), threshold=situation.number, inverse=self.looks_high, reason=self.reason)

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.grace_tokens + settings.window + (settings.patience - 1) * settings.stride


class KatPolicy(OfWindows, Calibrated):
    """`kat`: cut where window means stay below s, the quantile of other rollouts' least window means."""


class KatAbsolutePolicy(OfWindows, FromWarmup):
    """`kat_absolute`: the rule of `kat` with a floor from the config, `floor_nats`, in place of the quantile."""

    unit = "nats"
    key = "floor_nats"


class KatInversePolicy(OfWindows, Calibrated):
    """`kat_inverse`: cut where window means stay above s, the quantile of other rollouts' greatest window means."""

    looks_high = True
    reason = "kl_high"
