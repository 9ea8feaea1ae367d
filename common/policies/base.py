"""What a policy is: one class, each of whose instances judges one rollout. No Redis, no clock, no torch.

Invariant: a verdict is a function of the settings, the situation and the scored tokens, in any chunking. All of these
are recorded, so a replay of the record gives the same verdict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from common.config import Termination
from common.termination import Cut, MinimaBuffer
from common.wire.messages import VIEW, Floats, Ints


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy knows of a rollout before its first divergence.

    number: the policy's `number` when the rollout's first score was stored (deterministic runs: when it was
        admitted); None if there was none yet. Recorded as the rollout's threshold.
    seed: the rollout's own, 0 … 2^63 - 1; the same in every run of the same `seed`.
    max_tokens: the most tokens the rollout can have.
    """

    number: float | None
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of the run: the newest policy version, optimizer steps done, and the window extremes kept."""

    version: int
    step: int
    minima: MinimaBuffer


class ViewMissing(LookupError):
    """A policy reads what it was not given. The message says what, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """Consecutive tokens of one rollout, as a policy reads them.

    ids: integers [n]. divergence: float32 [n], nats, at least 0. view: float32 [3, n], rows as in VIEW, or None; the
    properties are its rows. Who judges gives a policy the rows that it names in `reads`.
    """

    ids: Ints
    divergence: Floats
    view: Floats | None = None

    @property
    def entropy(self) -> Floats:
        """Of the student, on the support: STOP, the support and the tail as one distribution; float32 [n], nats."""
        return self.row("entropy")

    @property
    def student_logprobs(self) -> Floats:
        """Of the sampled outcome under the student, temperature 1, before top-p; float32 [n], nats."""
        return self.row("student_logprobs")

    @property
    def teacher_logprobs(self) -> Floats:
        """Of the sampled outcome under the teacher; float32 [n], nats."""
        return self.row("teacher_logprobs")

    def row(self, name: str) -> Floats:
        """`divergence`, or a row of the view by its name in VIEW, [n]. Raises ViewMissing."""
        if name == "divergence":
            return self.divergence
        if self.view is None:
            raise ViewMissing(
                f"{name} of these tokens is not known: a policy names what it reads in `reads`, and a record made "
                f"without feeder.record_views, by a policy that reads less, does not hold it"
            )
        row: Floats = self.view[VIEW.index(name)]
        return row


class Policy(ABC):
    """One rollout's policy. Write `__init__(self, settings, situation)` and either `feed` or `feed_tokens`."""

    unit: ClassVar[str] = ""
    """Of `number`: "nats" (a threshold of window means), "tokens" or nothing."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """What it reads of a token beside id and divergence: names of VIEW. What nothing reads is not sent."""
    windows_of: ClassVar[str] = "divergence"
    """Whose window means fill the buffer, from which a calibrated policy has its number: the divergence, or one of
    `reads`."""
    looks_high: ClassVar[bool] = False
    """True: the buffer is filled with the rollouts' greatest window means, not with their least."""

    @abstractmethod
    def __init__(self, settings: Termination, situation: Situation) -> None: ...

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        """Take the next divergences (float, [n], nats); return a Cut once, where it fires; the rest is ignored.

        A Cut's trigger is the number of tokens after which it fired: at most those fed, and the same in any chunking.
        """
        raise NotImplementedError("a policy has `feed` or `feed_tokens`")

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        """Take the next tokens, as `feed` takes divergences; for a policy that reads more than the divergence.

        Whoever judges calls this one: a policy that defines it has no `feed`.
        """
        return self.feed(tokens.divergence)

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        """The finite number by which rollouts that begin now are judged; None for none."""
        return None

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        """The fewest tokens with which a rollout can be cut, whatever they are: its writer sends no chunk before.

        `seed`, `max_tokens`: as in `Situation`.
        """
        return 1

    @classmethod
    def active(cls, number: float | None) -> bool:
        """Whether a rollout judged by this number could be cut: only those count in the comparison of the arms."""
        return True

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        """Whether `number` can have returned this; for the checker."""
        return True


class Calibrated(Policy):
    """Base of policies that judge by s, the quantile of window minima; None, and not active, until there are enough."""

    unit = "nats"

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        if progress.version < settings.warmup_steps or len(progress.minima) < settings.min_calibration:
            return None
        return progress.minima.quantile(settings.eta if cls.looks_high else 1 - settings.eta)

    @classmethod
    def active(cls, number: float | None) -> bool:
        return number is not None


class FromWarmup(Policy):
    """Base of policies that judge by a number of the config, `key`, from `warmup_steps` on; before, not active."""

    key: ClassVar[str]

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        return float(getattr(settings, cls.key)) if progress.version >= settings.warmup_steps else None

    @classmethod
    def active(cls, number: float | None) -> bool:
        return number is not None

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        return number in (None, float(getattr(settings, cls.key)))
