"""The policies that look at window means: KAT, with its floor and its mirror, and the same of the entropy."""

from __future__ import annotations

from typing import ClassVar, TypedDict

from common.config import Termination
from common.policies.base import Calibrated, FromWarmup, Policy, ScoredTokens, Situation
from common.termination import Cut, Kat


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


class EntropyPolicy(OfWindows, Calibrated):
    """`entropy`: the rule of `kat` on the student's entropy in place of the divergence, calibrated the same way.

    The baseline for what the teacher adds: all else being equal, it needs none to see where the student is sure.
    """

    reads = frozenset({"entropy"})
    windows_of = "entropy"
    reason = "low_entropy"

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        return self.feed(tokens.entropy)
