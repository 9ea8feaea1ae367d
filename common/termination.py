"""When a rollout ends early: the rules and KAT's threshold, pure functions of scored tokens. No Redis, no clock.

Source: "Escaping the KL Agreement Trap in On-Policy Distillation", arXiv 2606.09471. With d_t the divergence of
token t (natural logarithm, nats):

    z_t = mean(d_{t-W+1} … d_t)      windows end at t = grace + W, grace + W + stride, … tokens seen
    trigger at the C-th consecutive evaluated window with z_t < s
    keep = t_first - W tokens, t_first being the first window of that streak

Invariant: a verdict is a function of a rollout's tokens, their divergences and one number, its threshold; how these
were cut into chunks cannot change it.
"""

from __future__ import annotations

import bisect
import math
import operator
import re
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import sub

import numpy as np
import numpy.typing as npt

# Window sums are integers in units of 2^-60 nats, so that adding and removing a token is exact: no drift, O(1) per
# token, and the same sum for any tokens before the window.
_UNIT_BITS = 60

# A rolling hash of token ids: a polynomial in _BASE modulo a prime. What it says is compared token by token.
_PRIME = (1 << 61) - 1
_BASE = 0x0F3A_95C1_7D2E_4B69

_REASON = re.compile(r"[A-Za-z0-9_.-]{1,40}", re.ASCII)
_OTHER_ENDS = ("eos", "length", "open", "unfinished")  # what the books call rollouts that no policy cut


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a rollout is cut: tokens seen when the rule fired, and tokens kept (0 ≤ keep ≤ trigger).

    Integers of any type (numpy's too) become ints, as the wire needs them. Raises TypeError for others, ValueError
    for a reason that the books could not distinguish from other endings.
    """

    trigger: int
    keep: int
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "trigger", operator.index(self.trigger))
        object.__setattr__(self, "keep", operator.index(self.keep))
        if not _REASON.fullmatch(self.reason) or self.reason in _OTHER_ENDS:
            raise ValueError(
                f"Cut.reason {self.reason!r:.80}: allowed are 1 to 40 ASCII letters, digits, '_', '.', '-', but not "
                f"{', '.join(_OTHER_ENDS)}"
            )


class NeverCut:
    """Nothing is cut."""

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        return None


class FixedLength:
    """The first `tokens` tokens are kept, whatever the divergences are."""

    def __init__(self, tokens: int, reason: str = "fixed") -> None:
        self._left = self._tokens = tokens
        self._reason = reason

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        before, self._left = self._left, self._left - len(divergence)
        # Strictly more: a rollout that ends by itself at the limit was not cut.
        return Cut(self._tokens, self._tokens, self._reason) if before >= 0 > self._left else None


class CutAt:
    """Fires when `trigger` tokens (None: never) have been seen, also at a rollout's last one; `keep` are kept."""

    def __init__(self, trigger: int | None, keep: int, reason: str) -> None:
        self._cut = None if trigger is None else Cut(trigger, keep, reason)
        self._seen = 0

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        before, self._seen = self._seen, self._seen + len(divergence)
        return self._cut if self._cut is not None and before < self._cut.trigger <= self._seen else None


class FirstRepeat:
    """Fires at the token that completes an n-gram of ids which occurred before; keeps what stood before it began.

    The two occurrences may overlap: of a loop, its first round is kept. Exact, as ids are compared wherever hashes are
    equal; O(1) amortised a token, in memory that grows with the tokens fed.
    """

    def __init__(self, n: int) -> None:
        if n < 2:
            raise ValueError(f"n {n} must be at least 2")
        self._n = n
        self._ids = array("q")
        self._places: dict[int, int] = {}  # hash of an n-gram → where it begins
        self._hash = 0
        self._leaving = pow(_BASE, n, _PRIME)
        self._fired = False

    def feed_ids(self, ids: npt.NDArray[np.integer]) -> Cut | None:
        """Take the next token ids [n]; a Cut once, where it fires."""
        if self._fired:
            return None
        for token in ids.tolist():
            if self._push(token):
                seen = len(self._ids)
                self._fired, self._ids, self._places = True, array("q"), {}
                return Cut(seen, seen - self._n, "repetition")
        return None

    def _push(self, token: int) -> bool:
        ids, n = self._ids, self._n
        ids.append(token)
        begin = len(ids) - n
        leaves = ids[begin - 1] * self._leaving if begin > 0 else 0
        self._hash = (self._hash * _BASE + token - leaves) % _PRIME
        if begin < 0:
            return False
        place = self._hash
        while (earlier := self._places.setdefault(place, begin)) != begin:
            if ids[earlier : earlier + n] == ids[begin:]:
                return True
            place += 1  # another n-gram of the same hash: the next free place is this one's
        return False


class Kat:
    """The KAT rule, streaming. `threshold` None: inactive; window minima are recorded, and it never fires.

    `inverse` mirrors it: it fires where means stay *above* the threshold, and `min_window` is the greatest mean.
    `reason`: of its cut. The values may be anything of a token in nats; of KAT they are divergences.
    """

    def __init__(
        self,
        *,
        window: int,
        patience: int,
        stride: int,
        grace_tokens: int,
        threshold: float | None,
        inverse: bool = False,
        reason: str | None = None,
    ) -> None:
        if window < 1 or patience < 1 or stride < 1 or grace_tokens < 0:
            raise ValueError(
                f"window {window}, patience {patience} and stride {stride} must be at least 1, "
                f"grace_tokens {grace_tokens} at least 0"
            )
        self._window, self._patience, self._stride = window, patience, stride
        # The mirrored rule is the same rule on negated values.
        self._sign = -1 if inverse else 1
        self._bound: int | float | None = None if threshold is None else self._sign * threshold
        if self._bound is not None and math.isfinite(self._bound):  # no sum is below minus infinity, all are below plus
            self._bound = least_sum(self._bound, window)
        # Window sums in units; the mean is the sum divided by `_whole`, and grows with it, so sums are compared.
        self._whole = window << _UNIT_BITS
        self._least: int | None = None
        self._least_of_all: int | None = None
        self._next = grace_tokens + window
        self._seen = self._streak = self._first = 0
        self._ends = [0]  # sums of all tokens up to each of the last `window` tokens, and up to the one before
        self._cut: Cut | None = None
        self._reason = reason or ("kl_high" if inverse else "kl_trap")

    @property
    def min_window(self) -> float | None:
        """The least mean of the windows up to the trigger; of all windows if it has not fired."""
        return self._mean(self._least)

    @property
    def min_window_of_all(self) -> float | None:
        """The least mean of all windows fed, those after the trigger included."""
        return self._mean(self._least_of_all)

    def _mean(self, units: int | None) -> float | None:
        return None if units is None else self._sign * (units / self._whole) + 0.0  # no negative zero

    def feed(self, divergence: npt.NDArray[np.floating]) -> Cut | None:
        first, sums = self._next, self._window_sums(divergence)
        if not sums:
            return None
        least = min(sums)
        if self._least_of_all is None or least < self._least_of_all:
            self._least_of_all = least
        if self._cut is not None:
            return None
        if self._bound is None or least >= self._bound:  # nearly always: no window is below the threshold
            self._streak = 0
        elif self._fires(first, sums, self._bound):
            self._cut = Cut(first + self._stride * self._place, self._first - self._window, self._reason)
            least = min(sums[: self._place + 1])
        self._least = least if self._least is None else min(self._least, least)
        return self._cut

    def _window_sums(self, divergence: npt.NDArray[np.floating]) -> list[int]:
        """Sums of the windows that these tokens complete and that are evaluated, in units."""
        scale = self._sign * float(1 << _UNIT_BITS)  # a power of two: the product is exact
        units = [int(value * scale) for value in divergence.tolist()]
        begin = self._seen - len(self._ends) + 1  # tokens before the first of `_ends`
        ends = self._ends[:-1] + list(accumulate(units, initial=self._ends[-1]))
        self._seen, self._ends = self._seen + len(units), ends[-self._window - 1 :]
        last = self._next - begin
        sums = list(map(sub, ends[last :: self._stride], ends[last - self._window :: self._stride]))
        self._next += self._stride * len(sums)
        return sums

    def _fires(self, first: int, sums: list[int], bound: int | float) -> bool:
        """Go on counting windows below the bound; `_place` is the one that completes the streak."""
        for self._place, total in enumerate(sums):
            if total >= bound:
                self._streak = 0
                continue
            if self._streak == 0:
                self._first = first + self._stride * self._place
            self._streak += 1
            if self._streak == self._patience:
                return True
        return False


@lru_cache(maxsize=4096)
def least_sum(mean: float, window: int) -> int:
    """The least sum of a window, in units of 2^-60 nats, whose mean, as a float, is at least `mean` (finite)."""
    whole = window << _UNIT_BITS
    part, of = mean.as_integer_ratio()
    high = -(-part * whole // of)  # not rounded, its mean is at least that; a little below, it is when rounded
    low = high - (abs(high) >> 52) - 1
    return low + bisect.bisect_left(range(low, high), mean, key=lambda total: total / whole)


def kat_verdict(
    divergence: Sequence[float] | npt.NDArray[np.floating],
    *,
    window: int,
    patience: int,
    stride: int = 1,
    grace_tokens: int = 0,
    threshold: float | None,
) -> tuple[int | None, int | None, float | None]:
    """The KAT rule on a whole rollout: (trigger, keep, min_window).

    Args:
        divergence: reverse KL of every token, float [n], nats, finite, not negative.
        threshold: s in nats, or None for a rule that is not active yet.

    Returns:
        Tokens seen when the rule fired and tokens kept (both None if it did not fire), and the least window mean over
        the windows evaluated up to there (None if there was none).

    Raises:
        ValueError: parameters out of range, or a divergence that is not finite.
    """
    values = np.asarray(divergence, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("divergence: expected one dimension of finite numbers")
    detector = Kat(window=window, patience=patience, stride=stride, grace_tokens=grace_tokens, threshold=threshold)
    cut = detector.feed(values)
    return (None, None, detector.min_window) if cut is None else (cut.trigger, cut.keep, detector.min_window)


class MinimaBuffer:
    """The last `size` window minima and their quantile; kept in order of arrival and sorted."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size
        for value in values:
            self.push(value)

    def __len__(self) -> int:
        return len(self._order)

    def push(self, value: float) -> None:
        if len(self._order) == self._size:
            oldest = self._order.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._order.append(value)
        bisect.insort(self._sorted, value)

    def quantile(self, level: float) -> float:
        """Quantile with linear interpolation (numpy's default). Raises ValueError when empty."""
        if not self._sorted:
            raise ValueError("quantile of an empty buffer")
        place = level * (len(self._sorted) - 1)
        low = math.floor(place)
        high = min(low + 1, len(self._sorted) - 1)
        return self._sorted[low] + (place - low) * (self._sorted[high] - self._sorted[low])
