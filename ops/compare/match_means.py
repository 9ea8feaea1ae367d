"""Means of `random_matched` with given hazards, and the settings that match them to KAT's. Pure functions.

A rollout that would be L tokens long without a cut, and whose drawn position is T, is cut if T ≤ L. The hazard gives
the distribution of T, rollouts that nothing stops that of L; nothing is simulated.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config import ConfigError

TOLERANCE = 0.02

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Means:
    """Tokens a rollout: generated (overshoot included), kept; and the share of rollouts that were cut."""

    generated: float
    kept: float
    cut: float


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings of random_matched: the chance of a cut by position, its factor, tokens cut at a trigger."""

    hazard: dict[int, float]
    scale: float
    detection_tokens: int


@dataclass(frozen=True, slots=True)
class LengthShares:
    """Lengths, in tokens, of rollouts that nothing stops, and the share of each (they sum to 1)."""

    tokens: Reals
    shares: Reals

    @property
    def mean(self) -> float:
        return float(self.shares @ self.tokens)


@dataclass(frozen=True, slots=True)
class Match:
    """What random_matched needs, with the means that it aims at and those that it will have."""

    rule: Rule
    wanted: Means
    expected: Means


def hazard_of(seen: Sequence[int] | Reals, cut: Sequence[bool] | npt.NDArray[np.bool_]) -> dict[int, float]:
    """The hazard at every position where a cut was; `seen` in tokens, with whether the rollout was cut there."""
    fired = Counter(int(tokens) for tokens, was_cut in zip(seen, cut, strict=True) if was_cut)
    lengths = np.sort(np.asarray(seen))
    return {at: fired[at] / int(len(lengths) - np.searchsorted(lengths, at)) for at in sorted(fired)}


def all_alike(tokens: npt.ArrayLike) -> LengthShares:
    """The lengths of so many rollouts, each counting as much as another."""
    values = np.asarray(tokens, np.float64)
    return LengthShares(values, np.full(len(values), 1 / len(values)))


def uncut_lengths(seen: Reals, cut: npt.NDArray[np.bool_]) -> LengthShares:
    """How long rollouts would be that nothing stops, from ones that chance has stopped.

    By E. L. Kaplan and P. Meier, "Nonparametric estimation from incomplete observations", 1958: at each length a share
    of what is left ends: ended there / came so far and were not cut there. A cut falls before the end: what was cut at
    t is at least t long. Unknown lengths count at the longest.
    """
    tokens, place = np.unique(seen, return_inverse=True)
    came, stopped = np.bincount(place), np.bincount(place, weights=cut)
    reached = came[::-1].cumsum()[::-1] - stopped
    left = np.cumprod(1 - (came - stopped) / np.maximum(reached, 1))
    shares = -np.diff(left, prepend=1.0)
    shares[-1] += left[-1]
    return LengthShares(tokens, shares)


def outcomes(rule: Rule, tokens: Reals, overshoot: float = 0.0) -> Reals:
    """What random_matched makes of rollouts of these lengths [n], on the mean over its draws, exactly.

    Returns:
        [n, 3]: tokens generated and kept, chance to be cut. A cut rollout is written on for `overshoot` tokens, or to
        its end.
    """
    at = np.array(sorted(rule.hazard))
    chances = np.minimum(1.0, rule.scale * np.array([rule.hazard[position] for position in at]))
    left = np.concatenate(([1.0], np.cumprod(1 - chances)))
    fires = left[:-1] * chances

    def upto(part: Reals | float, places: npt.NDArray[np.intp]) -> Reals:
        total: Reals = np.concatenate(([0.0], np.cumsum(fires * part)))[places]
        return total

    reached = np.searchsorted(at, tokens, side="right")  # places of a rollout's length or below
    passed = np.searchsorted(at, tokens - overshoot, side="right")  # those that are followed by the whole overshoot
    generated = upto(at + overshoot, passed) + left[passed] * tokens
    kept = upto(np.maximum(0.0, at - rule.detection_tokens), reached) + left[reached] * tokens
    return np.stack([generated, kept, upto(1.0, reached)], axis=1)


def expected_means(rule: Rule, lengths: LengthShares, overshoot: float = 0.0) -> Means:
    """Means of random_matched over rollouts that would by themselves be of these lengths; exact."""
    generated, kept, cut = (float(value) for value in lengths.shares @ outcomes(rule, lengths.tokens, overshoot))
    return Means(generated, kept, cut)


def match(hazard: dict[int, float], wanted: Means, lengths: LengthShares, overshoot: float = 0.0) -> Match:
    """Scale and detection by which random_matched comes to these means. Raises ConfigError where none does in 2 %."""
    if wanted.generated >= lengths.mean:
        raise ConfigError(
            f"cannot be matched: treated rollouts were no shorter ({wanted.generated:.1f} tokens) than those that "
            f"nothing stops ({lengths.mean:.1f})"
        )
    low, high = 0.0, 1.0 / min(hazard.values())  # there every chance is 1
    for _ in range(60):
        middle = (low + high) / 2
        longer = expected_means(Rule(hazard, middle, 0), lengths, overshoot).generated > wanted.generated
        low, high = (middle, high) if longer else (low, middle)
    rule = Rule(hazard, high, _detection(hazard, high, lengths, wanted.kept))
    expected = expected_means(rule, lengths, overshoot)
    if not agree(wanted, expected):
        raise ConfigError(
            f"cannot be matched within {TOLERANCE:.0%}: generated "
            f"{expected.generated:.2f} for {wanted.generated:.2f}, kept {expected.kept:.2f} for {wanted.kept:.2f}"
        )
    return Match(rule, wanted, expected)


def _detection(hazard: dict[int, float], scale: float, lengths: LengthShares, kept: float) -> int:
    """The number of cut tokens that brings the mean kept nearest; more of them keep less."""

    def missing(tokens: int) -> float:
        return kept - expected_means(Rule(hazard, scale, tokens), lengths).kept

    most = max(hazard)
    first = bisect.bisect_left(range(most), 0.0, key=missing)  # the first that keeps no more than is wanted
    return min((max(0, first - 1), first), key=lambda tokens: abs(missing(tokens)))


def agree(one: Means, other: Means) -> bool:
    """Whether means of generated and kept tokens differ by at most 2 %."""
    pairs = ((one.generated, other.generated), (one.kept, other.kept))
    return all(abs(b - a) <= TOLERANCE * a for a, b in pairs)
