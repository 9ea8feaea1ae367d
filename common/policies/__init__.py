"""The policies that may end a rollout early, by their name in `termination.policy`. No Redis, no clock, no torch.

A policy is one class, derived from `Policy` (`base.py`). A custom one is named by its file or its module;
docs/policies.md shows how.
"""

from common.policies.base import (
    Calibrated,
    FromWarmup,
    Policy,
    Progress,
    ScoredTokens,
    Situation,
    ViewMissing,
)
from common.policies.changes import AdaptivePolicy, MarginChangePolicy
from common.policies.finding import (
    POLICIES,
    check,
    check_policy,
    extremes,
    extremes_beside,
    find,
    unit_of,
    unwatched,
    written,
)
from common.policies.positions import (
    FixedPolicy,
    NonePolicy,
    RandomMatchedPolicy,
    RandomPolicy,
    RepetitionPolicy,
    ScheduledPolicy,
    drawn_position,
)
from common.policies.windows import EntropyPolicy, KatAbsolutePolicy, KatInversePolicy, KatPolicy, OfWindows
from common.termination import Cut, CutAt, FixedLength, Kat, MinimaBuffer, NeverCut  # what custom policies build on

__all__ = [
    "POLICIES",
    "AdaptivePolicy",
    "Calibrated",
    "Cut",
    "CutAt",
    "EntropyPolicy",
    "FixedLength",
    "FixedPolicy",
    "FromWarmup",
    "Kat",
    "KatAbsolutePolicy",
    "KatInversePolicy",
    "KatPolicy",
    "MarginChangePolicy",
    "MinimaBuffer",
    "NeverCut",
    "NonePolicy",
    "OfWindows",
    "Policy",
    "Progress",
    "RandomMatchedPolicy",
    "RandomPolicy",
    "RepetitionPolicy",
    "ScheduledPolicy",
    "ScoredTokens",
    "Situation",
    "ViewMissing",
    "check",
    "check_policy",
    "drawn_position",
    "extremes",
    "extremes_beside",
    "find",
    "unit_of",
    "unwatched",
    "written",
]
