"""What replayed verdicts come to, setting by setting: cuts, tokens saved, and answers that were cut off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ops.replay_record import Record
from ops.replay_verdicts import Verdict
from ops.report_series import wilson

RESAMPLES = 2000
_AT_ONCE = 4_000_000
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `count`, with Wilson's 95 % interval."""

    hits: int
    count: int

    @property
    def value(self) -> float | None:
        return self.hits / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.hits, self.count) if self.count else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting over the rollouts that count and that it could have cut (`active` of `rollouts`).

    generated: mean tokens up to the trigger, or all; whole: mean tokens without cutting; kept: mean tokens trained on.
    saving: 1 - generated / whole with its 95 % interval. number: median of the numbers judged by. All None where the
    policy was never active.

    early: right rollouts cut before the end of their answer (false stops): a part of it is not kept. unwritten: of
    these, it would not even have been written. late: right ones cut behind their answer. None: not to be known here.
    wrong: wrong rollouts that were cut.
    """

    rollouts: int
    active: int
    cut: Share
    generated: float | None
    whole: float | None
    kept: float | None
    saving: float | None
    saving_interval: tuple[float, float] | None
    number: float | None
    early: Share | None
    unwritten: Share | None
    late: Share | None
    wrong: Share


def outcomes(record: Record, settings: Sequence[Sequence[Verdict]], ends: Mapping[int, int] | None) -> list[Outcome]:
    """The outcome of each setting. `ends`: where answers end, in tokens, by place in the record; None: not known."""
    counted = record.counted
    whole = np.array([len(record.rollouts[place].divergence) for place in counted], dtype=np.float64)
    active = np.array([[verdicts[place].active for place in counted] for verdicts in settings])
    seen = np.array(
        [[_seen(verdicts[place], total) for place, total in zip(counted, whole, strict=True)] for verdicts in settings]
    )
    intervals = saving_intervals(seen, whole, active, [record.rollouts[place].problem for place in counted])
    return [
        _outcome(record, verdicts, ends, seen[row][active[row]], whole[active[row]], intervals[row])
        for row, verdicts in enumerate(settings)
    ]


def _seen(verdict: Verdict, total: float) -> float:
    return total if verdict.cut is None else float(verdict.cut.trigger)


def _outcome(
    record: Record,
    verdicts: Sequence[Verdict],
    ends: Mapping[int, int] | None,
    seen: _Floats,
    whole: _Floats,
    interval: tuple[float, float] | None,
) -> Outcome:
    """`seen`, `whole`: tokens of the active rollouts that count."""
    counted = record.counted
    active = [place for place in counted if verdicts[place].active]
    cuts = {place: cut for place in active if (cut := verdicts[place].cut) is not None}
    kept = [cuts[place].keep if place in cuts else len(record.rollouts[place].divergence) for place in active]
    numbers = [number for place in active if (number := verdicts[place].number) is not None]
    placed = None if ends is None else [place for place in active if place in ends]
    early = late = unwritten = None
    if placed is not None and ends is not None:
        early = _share(place in cuts and cuts[place].keep < ends[place] for place in placed)
        unwritten = _share(place in cuts and cuts[place].trigger < ends[place] for place in placed)
        late = _share(place in cuts and cuts[place].keep >= ends[place] for place in placed)
    return Outcome(
        rollouts=len(counted),
        active=len(active),
        cut=_share(place in cuts for place in active),
        generated=float(seen.mean()) if active else None,
        whole=float(whole.mean()) if active else None,
        kept=float(np.mean(kept)) if active else None,
        saving=float(1 - seen.sum() / whole.sum()) if active else None,
        saving_interval=interval,
        number=float(np.median(numbers)) if numbers else None,
        early=early,
        unwritten=unwritten,
        late=late,
        wrong=_share(place in cuts for place in active if record.rollouts[place].correct is False),
    )


def _share(hits: Iterable[bool]) -> Share:
    found = list(hits)
    return Share(sum(found), len(found))


def saving_intervals(
    seen: _Floats, whole: _Floats, active: npt.NDArray[np.bool_], problems: Sequence[int], *, seed: int = 0
) -> list[tuple[float, float] | None]:
    """95 % intervals of 1 - Σ seen / Σ whole over active rollouts, one a setting; None where none is active.

    As `ops.summary.length_saving`: a bootstrap of the ratio in which prompts are drawn with replacement, each with all
    its rollouts. All settings share the draws, since they share the rollouts.

    Args:
        seen: tokens up to the trigger, or all, float [settings, rollouts]; `active` likewise, bool.
        whole: tokens without cutting, float [rollouts]; `problems` likewise, the prompt of each.
    """
    prompts, place = np.unique(np.asarray(problems), return_inverse=True)
    table = np.zeros((len(prompts), 2 * len(seen)))
    for row, (tokens, counts) in enumerate(zip(seen, active, strict=True)):
        table[:, 2 * row] = np.bincount(place, weights=tokens * counts, minlength=len(prompts))
        table[:, 2 * row + 1] = np.bincount(place, weights=whole * counts, minlength=len(prompts))
    rng, count = np.random.default_rng(seed), len(prompts)
    sums = []
    block = max(1, _AT_ONCE // count)
    for begin in range(0, RESAMPLES, block):
        drawn = [
            np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(min(block, RESAMPLES - begin))
        ]
        sums.append(np.array(drawn, dtype=np.float64) @ table)
    return [_interval(one[:, 0], one[:, 1]) for one in np.split(np.concatenate(sums), len(seen), axis=1)]


def _interval(seen: _Floats, whole: _Floats) -> tuple[float, float] | None:
    drawn = whole > 0
    if not drawn.any():
        return None
    low, high = np.quantile(1 - seen[drawn] / whole[drawn], [0.025, 0.975])
    return float(low), float(high)
