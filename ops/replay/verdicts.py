"""Verdicts once more, from recorded tokens and other settings: as the arbiter would have given them, in its order.

Invariant: under the settings and the number of its record, a rollout has the verdict of its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common import policies
from common.config import ConfigError, Termination
from common.policies import Progress, Situation
from common.policy_names import OF_WINDOWS
from common.termination import Cut, MinimaBuffer, least_sum
from common.wire.messages import Floats
from ops.replay.record import Recording, Replayed

_BITS = 30  # a sum is high · 2^30 + low, in the units of 2^-60 nats that common.termination counts in
_LOW = (1 << _BITS) - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What the window means of a rollout depend on; `inverse`: mirrored, so that the greatest is the least; `row`: what
    the means are of, the divergence or a row of the view."""

    window: int
    stride: int
    grace_tokens: int
    inverse: bool
    row: str = "divergence"

    @classmethod
    def of(cls, settings: Termination) -> Shape:
        policy = policies.find(settings.policy)
        return cls(settings.window, settings.stride, settings.grace_tokens, policy.looks_high, policy.windows_of)


class Windows:
    """The sums of a rollout's evaluated windows, exact: the rule of `common.termination.Kat`, whole rollouts at a time.

    Kat goes through the tokens in Python, which is minutes for a sweep; numpy takes a small part of that.
    """

    def __init__(self, values: Floats, shape: Shape) -> None:
        """`values`: divergences, or what else the means are of; float32 [n], nats, finite, between -2^20 and 2^20."""
        self._shape = shape
        # As Kat: what lies below a unit is cut off towards zero. float32 leaves room for both steps in float64.
        scaled = values.astype(np.float64) * (-(1 << _BITS) if shape.inverse else 1 << _BITS)
        high = np.trunc(scaled)
        low = np.trunc((scaled - high) * (1 << _BITS))
        ends = np.arange(shape.grace_tokens + shape.window, len(values) + 1, shape.stride)
        sums = [np.concatenate(([0], np.cumsum(part.astype(np.int64)))) for part in (high, low)]
        self._high, rest = (one[ends] - one[ends - shape.window] for one in sums)
        self._high += rest >> _BITS
        self._low = rest & _LOW
        self._least = self._least_of(len(ends))

    def _least_of(self, count: int) -> int | None:
        """The least sum of the first `count` windows, in units."""
        if count == 0:
            return None
        high = int(self._high[:count].min())
        return (high << _BITS) + int(self._low[:count][self._high[:count] == high].min())

    def minimum(self, seen: int | None = None) -> float | None:
        """The least (mirrored: greatest) mean, in nats, of the windows in the first `seen` tokens; None: in all."""
        shape, least = self._shape, self._least
        if seen is not None:
            least = self._least_of(max(0, (seen - shape.window - shape.grace_tokens) // shape.stride + 1))
        if least is None:
            return None
        mean = least / (shape.window << 2 * _BITS)
        return (-mean if shape.inverse else mean) + 0.0  # no negative zero

    def cut(self, threshold: float, patience: int, reason: str) -> Cut | None:
        """Where Kat of this threshold (nats) fires; `reason`: of its cut."""
        shape = self._shape
        limit = least_sum(-threshold if shape.inverse else threshold, shape.window)
        if self._least is None or self._least >= limit:
            return None
        below = self._high < limit >> _BITS
        ties = self._high == limit >> _BITS
        if ties.any():
            below |= ties & (self._low < (limit & _LOW))
        if len(below) < patience:
            return None
        count = np.concatenate(([0], np.cumsum(below)))
        streaks = count[patience:] - count[:-patience] == patience
        first = int(streaks.argmax())
        if not streaks[first]:
            return None
        begin = shape.grace_tokens + first * shape.stride
        trigger = begin + shape.window + (patience - 1) * shape.stride
        return Cut(trigger, begin, reason)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one rollout: the number that it was judged by, whether it could be cut, and where it was."""

    number: float | None
    active: bool
    cut: Cut | None


class Replay:
    """One record under many settings."""

    def __init__(self, record: Recording) -> None:
        self._record = record
        self._shape: Shape | None = None
        self._windows: list[Windows] = []

    def as_recorded(self, settings: Termination) -> list[Judgement]:
        """A verdict for each rollout, by the number that it was judged by in the run."""
        windows, policy = self._windows_of(settings), policies.find(settings.policy)
        return [
            Judgement(
                one.threshold, policy.active(one.threshold), self._cut(settings, one, windows[place], one.threshold)
            )
            for place, one in enumerate(self._record.rollouts)
        ]

    def recomputed(self, settings: Termination) -> list[Judgement]:
        """A verdict for each rollout, by numbers that come from the replayed rollouts themselves.

        A rollout that was not free gets none, and pushes nothing. What begins is judged by the number of the moment in
        which it was admitted; in the run, by that of its first score, a little later (deterministic runs: the same).
        """
        windows, policy = self._windows_of(settings), policies.find(settings.policy)
        verdicts = []
        # Each teacher has its own buffer, and its own number after so many verdicts; before the first there is none.
        buffers = {one.teacher: MinimaBuffer(settings.buffer_size) for one in self._record.rollouts}
        numbers: dict[str, list[float | None]] = {teacher: [None] for teacher in buffers}
        for place, one in enumerate(self._record.rollouts):
            minima = buffers[one.teacher]
            progress, number, cut = Progress(one.version, one.step, minima), numbers[one.teacher][one.known], None
            if one.free:
                cut = self._cut(settings, one, windows[place], number)
                arm = self._arm_of(one, settings)
                stopped = cut if arm == "treated" else None
                # As the arbiter has it: the number of this moment decides, before the minimum is in.
                inactive = policy.number(settings, progress) is None
                if inactive or _calibrates(arm, settings, stopped):
                    least = windows[place].minimum(stopped.trigger if stopped else None)
                    if least is not None:
                        minima.push(least)
            verdicts.append(Judgement(number, policy.active(number), cut))
            for teacher, own in numbers.items():  # a verdict changes the number of its own teacher
                own.append(policy.number(settings, progress) if teacher == one.teacher else own[-1])
        return verdicts

    def _arm_of(self, rollout: Replayed, settings: Termination) -> str:
        """As recorded; under another control_fraction, as the feeder would have drawn it."""
        fraction = settings.control_fraction
        if fraction == self._record.config.termination.control_fraction:
            return rollout.arm
        return "treated" if rollout.lot >= fraction else "control"

    def _cut(self, settings: Termination, rollout: Replayed, windows: Windows, number: float | None) -> Cut | None:
        policy = policies.find(settings.policy)
        if settings.policy in OF_WINDOWS and issubclass(policy, policies.OfWindows):
            return None if number is None else windows.cut(number, settings.patience, policy.reason)
        limit = self._record.config.rollout.max_completion_length
        judge = policy(settings, Situation(number, rollout.seed, limit))
        return _checked(judge.feed_tokens(rollout.scored), rollout)

    def _windows_of(self, settings: Termination) -> Sequence[Windows]:
        """Of one shape at a time: those of a long run take as much memory as its traces, four times over."""
        shape = Shape.of(settings)
        if shape != self._shape:
            self._windows = []
            self._windows = [Windows(one.scored.row(shape.row), shape) for one in self._record.rollouts]
            self._shape = shape
        return self._windows


def reproduced(record: Recording, verdicts: Sequence[Judgement]) -> int:
    """How many rollouts got their recorded verdict; all, by the recorded settings and numbers, if nothing is wrong."""
    settings, found = record.config.termination, 0
    for one, verdict in zip(record.rollouts, verdicts, strict=True):
        total = len(one.divergence)
        trigger, keep = (verdict.cut.trigger, verdict.cut.keep) if verdict.cut else (total, total)
        stopped = settings.stops(one.arm) and verdict.cut is not None
        found += (trigger, keep, stopped) == (one.trigger, one.keep, one.stopped)
    return found


def _calibrates(arm: str, settings: Termination, stopped: Cut | None) -> bool:
    if settings.calibrate_on == "control":
        return arm == "control"
    return settings.calibrate_on == "all" or stopped is None


def _checked(cut: Cut | None, rollout: Replayed) -> Cut | None:
    """Raises ConfigError for a cut that a policy of the user's own cannot have made; the arbiter refuses it, too."""
    if cut is None or 0 <= cut.keep <= cut.trigger <= len(rollout.divergence):
        return cut
    raise ConfigError(
        f"rollout {rollout.rid}: the policy cuts at trigger {cut.trigger}, keep {cut.keep}; allowed: 0 <= keep <= "
        f"trigger <= {len(rollout.divergence)}, its tokens"
    )
