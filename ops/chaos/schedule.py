"""Which faults, in which order: drawn from a seed; and what came of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.config import ConfigError
from ops.chaos.faults import KINDS
from ops.chaos.records import Violation

_ALONE_SHARE = 1 / 4  # of each kind, injected alone


@dataclass(slots=True)
class Fault:
    """One fault of the schedule, and what came of it. Times in seconds."""

    kind: str
    alone: bool
    seed: int
    at_s: float = 0.0
    note: str = ""
    injected: bool = False
    survived: bool = False
    recovery_s: float | None = None  # only of those injected alone


@dataclass(slots=True)
class ChaosResult:
    """What a run under faults came to."""

    seed: int
    faults: list[Fault]
    violations: list[Violation] = field(default_factory=list)
    wall_s: float = 0.0
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.violations


def schedule(seed: int, faults: int, kinds: Sequence[str]) -> list[Fault]:
    """`faults` faults, as many of each kind as of any other (or one more); a quarter of each alone, in front.

    Raises ConfigError for a kind that is not known.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds: unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    rng = random.Random(seed)
    order = rng.sample(list(kinds), len(kinds))
    drawn = [order[number % len(order)] for number in range(faults)]
    alone: list[Fault] = []
    together: list[Fault] = []
    for kind in order:
        count = drawn.count(kind)
        first = int(count * _ALONE_SHARE)
        alone += [Fault(kind, True, rng.getrandbits(32)) for _ in range(first)]
        together += [Fault(kind, False, rng.getrandbits(32)) for _ in range(count - first)]
    rng.shuffle(alone)
    rng.shuffle(together)
    return alone + together
