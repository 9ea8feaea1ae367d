"""A policy of one's own, as docs/policies.md shows it: cut when the divergence has halved for good."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.config import Termination
from common.policies import KatPolicy, Policy, ScoredTokens, Situation
from common.termination import Cut


class Halved(Policy):
    """Cuts where `patience` tokens in a row lie below half of the mean of the first `options.head` tokens."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        self._head, self._patience = int(settings.options["head"]), settings.patience
        self._seen = self._low = 0
        self._sum = 0.0

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        for value in divergence.tolist():
            self._seen += 1
            if self._seen <= self._head:
                self._sum += value
                continue
            self._low = self._low + 1 if value < 0.5 * self._sum / self._head else 0
            if self._low == self._patience:
                return Cut(trigger=self._seen, keep=self._seen - self._patience, reason="halved")
        return None


class Marked(Policy):
    """Reads the tokens: cuts in front of the first one that is `options.token`."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        self._token, self._seen = settings.options["token"], 0

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        (found,) = np.nonzero(tokens.ids == self._token)
        if len(found):
            self._seen += int(found[0]) + 1
            return Cut(trigger=self._seen, keep=self._seen - 1, reason="marked")
        self._seen += len(tokens.ids)
        return None


class Sure(Policy):
    """Reads the student's entropy: cuts in front of `patience` tokens in a row that lie below `options.nats`."""

    reads = frozenset({"entropy"})

    def __init__(self, settings: Termination, situation: Situation) -> None:
        self._floor, self._patience = settings.options["nats"], settings.patience
        self._seen = self._low = 0

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        for entropy in tokens.entropy.tolist():
            self._seen += 1
            self._low = self._low + 1 if entropy < self._floor else 0
            if self._low == self._patience:
                return Cut(trigger=self._seen, keep=self._seen - self._patience, reason="sure")
        return None


class SureOfWindows(KatPolicy):
    """KAT's rule on the student's entropy: calibrated on the window means of the entropy."""

    reads = frozenset({"entropy"})
    windows_of = "entropy"

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        return self.feed(tokens.entropy)


class Undeclared(Sure):
    """Does not say what it reads."""

    reads = frozenset()


class Misread(Sure):
    """Says that it reads what there is not."""

    reads = frozenset({"entropie"})


class MisreadWindows(Sure):
    """Is calibrated on what it does not read."""

    windows_of = "teacher_logprobs"


class Unfinished(Policy):
    """Not usable: it has no `feed`."""


NotAClass = 3


class Summed(Halved):
    """As it may come out of numpy: whole numbers of its kind, and a number that is in tokens."""

    unit = "tokens"

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        cut = super().feed(divergence)
        return cut and Cut(np.int64(cut.trigger), np.uint8(cut.keep), "summed")  # type: ignore[arg-type]


class Unwilling(Policy):
    """Its mistake shows when an object is made."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        mistakes = {1: lambda: settings.nothing, 2: lambda: 1 / 0}  # type: ignore[attr-defined]
        mistakes[int(settings.options["mistake"])]()

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        return None
