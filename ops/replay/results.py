"""Results of replayed verdicts for each setting: cuts, tokens saved, and answers that were cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.wire.messages import Floats
from ops.replay.answers import Answers
from ops.replay.record import Recording
from ops.replay.verdicts import Judgement
from ops.stats.intervals import Reals, interval, resampled_sums, unseen_share, wilson

_ALIKE = 250  # rollouts of neighbouring policy versions that are compared with each other
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class HitShare:
    """`hits` of `count`, with a 95 % interval; None of nothing."""

    hits: int
    count: int
    interval: tuple[float, float] | None

    @property
    def value(self) -> float | None:
        return self.hits / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting over the rollouts that count and that it could have cut (`active` of `rollouts`).

    generated: mean tokens up to the trigger, or all; whole: mean tokens without cutting; kept: mean tokens trained on.
    saving: 1 - generated / whole with its 95 % interval. number: median of the numbers judged by. All None where the
    policy was never active.

    signal: divergence after the triggers, summed over its tokens, as a multiple of that of as many tokens at the same
    places of rollouts of about the same policy version that were uncut there, with its 95 % interval (which takes the
    latter as known). Near 0: the signal is dead; 1: it is as alive as anywhere. None where nothing is cut, or nothing
    uncut continues after a trigger (`fixed`).

    early: right rollouts of which what is kept is not right (false stops). unwritten: of these, what was written up to
    the trigger is not, either. late: right ones that were cut and are right as they were kept. None: not to be known
    here. wrong: wrong rollouts that were cut.
    """

    rollouts: int
    active: int
    cut: HitShare
    generated: float | None
    whole: float | None
    kept: float | None
    saving: float | None
    saving_interval: tuple[float, float] | None
    signal: float | None
    signal_interval: tuple[float, float] | None
    number: float | None
    early: HitShare | None
    unwritten: HitShare | None
    late: HitShare | None
    wrong: HitShare


def outcomes(record: Recording, settings: Sequence[Sequence[Judgement]], answers: Answers | None) -> list[Outcome]:
    """The outcome of each setting. `answers`: what is right of what they keep; None: not known."""
    counted = record.counted
    problems = [record.rollouts[place].problem for place in counted]
    whole = np.array([len(record.rollouts[place].divergence) for place in counted], dtype=np.float64)
    active = np.array([[verdicts[place].active for place in counted] for verdicts in settings])
    seen = np.array(
        [[_seen(verdicts[place], total) for place, total in zip(counted, whole, strict=True)] for verdicts in settings]
    )
    savings = saving_intervals(seen, whole, active, problems)
    ahead = [_to_come(record.rollouts[place].divergence) for place in counted]
    after, expected = np.array([_signals(record, verdicts, ahead) for verdicts in settings]).transpose(1, 0, 2)
    signals = _drawn_ratios(after, expected, problems)
    parts = [_parts(record, verdicts, answers) for verdicts in settings]
    shares = {name: _shares([one[name] for one in parts], problems) for name in parts[0]}
    return [
        _outcome(
            record,
            verdicts,
            {name: found[row] for name, found in shares.items()},
            seen[row][active[row]],
            whole[active[row]],
            savings[row],
            _ratio(after[row], expected[row]),
            signals[row],
        )
        for row, verdicts in enumerate(settings)
    ]


def _to_come(divergence: Floats) -> Reals:
    """The divergence from each token on, summed: float64 [n]."""
    return np.cumsum(divergence[::-1], dtype=np.float64)[::-1]


def _signals(record: Recording, verdicts: Sequence[Judgement], ahead: Sequence[Reals]) -> Reals:
    """For each rollout that counts, the divergence after its trigger, and the expected one of as many tokens at
    that place: float64 [2, rollouts], 0 of one that is not cut, or has nothing to be compared with.

    Expected is the mean per token, from the trigger on, of the active rollouts of about the same policy version that
    were still going there and uncut: divergence falls along a text, and as the student learns. What stands from `keep`
    to the trigger is left out: these windows were chosen for being low.
    """
    found = np.zeros((2, len(ahead)))
    active = [row for row, place in enumerate(record.counted) if verdicts[place].active]
    active.sort(key=lambda row: record.rollouts[record.counted[row]].version)
    for rows in np.array_split(np.array(active, dtype=int), max(1, len(active) // _ALIKE)):
        triggers = [_trigger(verdicts[record.counted[row]]) for row in rows]
        found[:, rows] = _against_uncut(triggers, [ahead[row] for row in rows])
    return found


def _trigger(verdict: Judgement) -> int | None:
    return None if verdict.cut is None else verdict.cut.trigger


def _against_uncut(triggers: Sequence[int | None], ahead: Sequence[Reals]) -> Reals:
    """`_signals` of rollouts that are alike."""
    longest = max((len(sums) for sums in ahead), default=0)
    sums, tokens = np.zeros(longest), np.zeros(longest)  # from each place on, of those that are uncut there
    for trigger, own in zip(triggers, ahead, strict=True):
        end = len(own) if trigger is None else min(trigger, len(own))
        sums[:end] += own[:end]
        tokens[:end] += np.arange(len(own), len(own) - end, -1)
    found = np.zeros((2, len(ahead)))
    for row, (trigger, own) in enumerate(zip(triggers, ahead, strict=True)):
        if trigger is not None and trigger < len(own) and tokens[trigger]:
            found[:, row] = own[trigger], (len(own) - trigger) * sums[trigger] / tokens[trigger]
    return found


def _ratio(over: Reals, under: Reals) -> float | None:
    return float(over.sum() / under.sum()) if under.sum() > 0 else None


def _seen(verdict: Judgement, total: float) -> float:
    return total if verdict.cut is None else float(verdict.cut.trigger)


def _outcome(
    record: Recording,
    verdicts: Sequence[Judgement],
    shares: Mapping[str, HitShare],
    seen: Reals,
    whole: Reals,
    interval: tuple[float, float] | None,
    signal: float | None,
    signal_interval: tuple[float, float] | None,
) -> Outcome:
    """`seen`, `whole`: tokens of the active rollouts that count."""
    counted = record.counted
    active = [place for place in counted if verdicts[place].active]
    kept = [cut.keep if (cut := verdicts[place].cut) else len(record.rollouts[place].divergence) for place in active]
    numbers = [number for place in active if (number := verdicts[place].number) is not None]
    return Outcome(
        rollouts=len(counted),
        active=len(active),
        cut=shares["cut"],
        generated=float(seen.mean()) if active else None,
        whole=float(whole.mean()) if active else None,
        kept=float(np.mean(kept)) if active else None,
        saving=float(1 - seen.sum() / whole.sum()) if active else None,
        saving_interval=interval,
        signal=signal,
        signal_interval=signal_interval,
        number=float(np.median(numbers)) if numbers else None,
        early=shares.get("early"),
        unwritten=shares.get("unwritten"),
        late=shares.get("late"),
        wrong=shares["wrong"],
    )


# --- shares and their intervals ---------------------------------------------------------------------------------------


def _parts(
    record: Recording, verdicts: Sequence[Judgement], answers: Answers | None
) -> dict[str, tuple[_Bools, _Bools]]:
    """Of each share, over the rollouts that count: which are hits, and which it is a share of."""
    counted = record.counted
    active = np.array([verdicts[place].active for place in counted])
    cut = active & np.array([verdicts[place].cut is not None for place in counted])
    wrong = active & np.array([record.rollouts[place].correct is False for place in counted])
    parts = {"cut": (cut, active), "wrong": (cut & wrong, wrong)}
    if answers is None:
        return parts
    right = active & np.array([record.rollouts[p].correct is True and p not in answers.unsure for p in counted])
    kept, written = cut & right, cut & right
    for row, place in enumerate(counted):
        found = verdicts[place].cut
        if kept[row] and found is not None:
            kept[row] = answers.right[place, found.keep]
            written[row] = kept[row] or answers.right[place, found.trigger]
    early = cut & right & ~kept
    return parts | {"early": (early, right), "unwritten": (early & ~written, right), "late": (kept, right)}


def _shares(parts: Sequence[tuple[_Bools, _Bools]], problems: Sequence[int]) -> list[HitShare]:
    """One a setting. Wilson's intervals need rollouts that know nothing of each other: where two are of one prompt, the
    interval comes from a bootstrap by prompt."""
    hits, of = (np.array(one, dtype=np.float64) for one in zip(*parts, strict=True))
    if len(set(problems)) < len(problems):
        intervals = ratio_intervals(hits, of, problems)
    else:
        intervals = [
            wilson(int(hit.sum()), int(count.sum())) if count.any() else None
            for hit, count in zip(hits, of, strict=True)
        ]
    return [
        HitShare(int(hit.sum()), int(count.sum()), interval)
        for hit, count, interval in zip(hits, of, intervals, strict=True)
    ]


def saving_intervals(
    seen: Reals, whole: Reals, active: _Bools, problems: Sequence[int]
) -> list[tuple[float, float] | None]:
    """95 % intervals of 1 - Σ seen / Σ whole over active rollouts, one a setting; None where none is active.

    As `ops.stats.saving.length_saving`: a bootstrap of the ratio in which prompts are drawn with replacement, each
    with all its rollouts.

    Args:
        seen: tokens up to the trigger, or all, float [settings, rollouts]; `active` likewise, bool.
        whole: tokens without cutting, float [rollouts]; `problems` likewise, the prompt of each.
    """
    found = _drawn_ratios(seen * active, whole * active, problems)
    return [None if one is None else (1 - one[1], 1 - one[0]) for one in found]


def ratio_intervals(hits: Reals, of: Reals, problems: Sequence[int]) -> list[tuple[float, float] | None]:
    """95 % intervals of shares Σ hits / Σ of, one a setting, by a bootstrap by prompt; None of nothing.

    Where all prompts are alike, draws have no width; then `unseen_share` of all prompts may be otherwise.

    Args:
        hits: 0 or 1, float [settings, rollouts], 0 wherever `of`, of the same shape, is 0.
        problems: the prompt of each rollout.
    """
    found = _drawn_ratios(hits, of, problems)
    for row, (one, hit, count) in enumerate(zip(found, hits, of, strict=True)):
        if one is not None and one[1] - one[0] < 1e-12:
            share = float(hit.sum() / count.sum())
            unseen = unseen_share(len(np.unique(np.asarray(problems)[count > 0])))
            found[row] = share * (1 - unseen), share + (1 - share) * unseen
    return found


def _drawn_ratios(over: Reals, under: Reals, problems: Sequence[int]) -> list[tuple[float, float] | None]:
    """Of each row the 2.5 % and 97.5 % points of Σ over / Σ under, prompts drawn with replacement; None where `under`
    is 0. All rows share the draws, since they share the rollouts."""
    columns = np.stack([over, under], axis=1).reshape(-1, over.shape[1]).T
    sums = resampled_sums(problems, columns)
    return [_interval(one[:, 0], one[:, 1]) for one in np.split(sums, len(over), axis=1)]


def _interval(over: Reals, under: Reals) -> tuple[float, float] | None:
    drawn = under > 0
    if not drawn.any():
        return None
    return interval(over[drawn] / under[drawn])
