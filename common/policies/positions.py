"""Policies that look at no distribution: a length, a draw, or the token ids."""

from __future__ import annotations

from common.config import Termination
from common.draws import fraction
from common.policies.base import FromWarmup, Policy, Progress, ScoredTokens, Situation
from common.termination import Cut, CutAt, FirstRepeat, FixedLength, NeverCut


class NonePolicy(NeverCut, Policy):
    """`none`: nothing is cut."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        pass

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return max_tokens

    @classmethod
    def active(cls, number: float | None) -> bool:
        return False


class FixedPolicy(FixedLength, Policy):
    """`fixed`: the first `fixed_tokens` tokens are kept."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(settings.fixed_tokens, "fixed")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.fixed_tokens + 1  # by then it is known that there are more


class ScheduledPolicy(FixedLength, Policy):
    """`scheduled`: the first N tokens are kept; N grows from `fixed_tokens` to `scheduled_tokens` in
    `scheduled_steps`."""

    unit = "tokens"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        # There is no number before the first verdict of a run, when no step is done.
        tokens = settings.fixed_tokens if situation.number is None else int(situation.number)
        super().__init__(tokens, "scheduled")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.fixed_tokens + 1  # a schedule grows

    @classmethod
    def number(cls, settings: Termination, progress: Progress) -> float | None:
        first, last, steps = settings.fixed_tokens, settings.scheduled_tokens, settings.scheduled_steps
        return float(first + (last - first) * min(progress.step, steps) // steps)

    @classmethod
    def possible(cls, settings: Termination, number: float | None) -> bool:
        return number is None or (number.is_integer() and settings.fixed_tokens <= number <= settings.scheduled_tokens)


class RandomPolicy(FixedLength, Policy):
    """`random`: the first N tokens are kept, N uniform over 1 … `max_completion_length`, drawn for each rollout."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(_random_length(situation.seed, situation.max_tokens), "random")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return _random_length(seed, max_tokens) + 1


def _random_length(seed: int, max_tokens: int) -> int:
    return 1 + int(fraction(seed, "cut") * max_tokens)


class RandomMatchedPolicy(CutAt, FromWarmup):
    """`random_matched`: random cuts with KAT's realised hazard at each position, scaled; it ignores divergences.

    With probability min(1, hazard_scale · hazard[t]) it fires at token t, if it has not before; the last
    `detection_tokens` tokens up to there are cut. The position is drawn before the first token: a rollout that ends
    before it is not cut.
    """

    key = "hazard_scale"

    def __init__(self, settings: Termination, situation: Situation) -> None:
        trigger = None
        if situation.number is not None:
            trigger = drawn_position(settings.hazard, situation.number, fraction(situation.seed, "cut"))
        super().__init__(trigger, 0 if trigger is None else max(0, trigger - settings.detection_tokens), "random")

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return drawn_position(settings.hazard, settings.hazard_scale, fraction(seed, "cut")) or max_tokens


def drawn_position(hazard: dict[int, float], scale: float, share: float) -> int | None:
    """The first position by which the probability of a cut exceeds `share` (0 … 1); None if there is none."""
    survival = 1.0
    for position in sorted(hazard):
        survival *= 1 - min(1.0, scale * hazard[position])
        if 1 - survival > share:
            return position
    return None


class RepetitionPolicy(FirstRepeat, Policy):
    """`repetition`: cut at the first n-gram of token ids, n = `ngram`, that the rollout has twice."""

    def __init__(self, settings: Termination, situation: Situation) -> None:
        super().__init__(settings.ngram)

    @classmethod
    def earliest(cls, settings: Termination, seed: int, max_tokens: int) -> int:
        return settings.ngram + 1  # the two may overlap

    def feed_tokens(self, tokens: ScoredTokens) -> Cut | None:
        return self.feed_ids(tokens.ids)
