"""Endings of a run's rollouts, and whether those that were not trained on are a fair sample. From the books alone.

Long rollouts grow old: of those that reach the learner they are the first to be dropped as stale, and the trained texts
are shorter than the written ones. So for each ending this module gives the number of rollouts and two lengths: tokens
to train on (that the learner got, or would have got: the sample for training) and tokens written (the cause of the
delay; for a rollout that was never judged, the tokens stored so far).

Not a fair sample: the mean length of those left out is unlikely for as many, drawn at random from them and the trained.
This is tested for rollouts that were left out because of time or accident. `empty` ones were left out by their policy,
which found nothing to keep, and those open at the end of a run were not refused: their lengths are only shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.runfiles.records import BookLine, Ended, Lengths

MEANINGS = {
    "stale": "older than learner.max_staleness when the learner took it",
    "empty": "nothing kept",
    "run_end": "open when the run ended",
    "lost": "lost with Redis's data",
    "dead": "given up",
}
_BY_DESIGN = frozenset({"trained", "empty", "run_end"})
_Z = 2.576  # 99 draws of 100: a grid has many cells, and one in twenty would be called without cause
NEGLIGIBLE = 0.01
"""A share of those left out, of them and the trained, that `katana compare` does not warn of. At 1 % they would have to
be three times as long as the trained to move the mean of the sample by 2 %, within which arms count as matched."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Mean length of those left out, that of the trained, and the means that a fair sample has 99 times of 100."""

    left_out: float
    trained: float
    low: float
    high: float

    @property
    def fair(self) -> bool:
        slack = 1e-9 * max(1.0, self.high)
        return self.low - slack <= self.left_out <= self.high + slack


@dataclass(frozen=True, slots=True)
class UntrainedEnding:
    """An ending that was not trained on, beside the trained; no gap where a length is not on record."""

    ended: Ended
    trained: Ended
    trainable: Gap | None
    generated: Gap | None

    @property
    def fair(self) -> bool | None:
        """Whether both lengths are those of a fair sample; None where none is known, or it is not asked."""
        gaps = [gap for gap in (self.trainable, self.generated) if gap is not None]
        if not gaps or self.ended.fate in _BY_DESIGN:
            return None
        return all(gap.fair for gap in gaps)

    @property
    def warns(self) -> bool:
        """More than NEGLIGIBLE, and not a fair sample or (its lengths are lost) not known to be one."""
        return self.ended.fate not in _BY_DESIGN and self.ended.share > NEGLIGIBLE and self.fair is not True


def by_ending(lines: Iterable[BookLine]) -> dict[str, Ended]:
    """Fate → what ended so: the trained first, then the most frequent."""
    groups: dict[str, list[BookLine]] = {}
    for line in lines:
        groups.setdefault(line.fate, []).append(line)
    trained = len(groups.get("trained", ()))
    order = sorted(groups, key=lambda name: (name != "trained", -len(groups[name]), name))
    return {name: _ended(name, groups[name], trained) for name in order}


def _ended(name: str, lines: Sequence[BookLine], trained: int) -> Ended:
    return Ended(
        fate=name,
        rollouts=len(lines),
        share=1.0 if name == "trained" else len(lines) / (len(lines) + trained),
        trainable=_lengths([known for line in lines if (known := _trainable(line)) is not None]),
        generated=None if name == "lost" else _lengths([line.tokens_generated for line in lines]),
        at_limit=sum(line.finish_reason == "length" for line in lines),
    )


def _trainable(line: BookLine) -> int | None:
    """Of the trained also in books older than the field."""
    return line.tokens_trained if line.ending == "trained" else line.tokens_trainable


def _lengths(tokens: Sequence[int]) -> Lengths | None:
    if not tokens:
        return None
    mean = sum(tokens) / len(tokens)
    return Lengths(len(tokens), mean, math.sqrt(sum((one - mean) ** 2 for one in tokens) / len(tokens)))


def left_out(endings: dict[str, Ended]) -> list[UntrainedEnding]:
    """All that was not trained on, each beside the trained; nothing where nothing was trained on yet."""
    trained = endings.get("trained")
    if trained is None:
        return []
    return [
        UntrainedEnding(
            ended, trained, gap(ended.trainable, trained.trainable), gap(ended.generated, trained.generated)
        )
        for ended in endings.values()
        if ended is not trained
    ]


def to_json(endings: dict[str, Ended]) -> dict[str, Any]:
    """For `summary.json`; what was left out with `fair_sample`, None if it is unknown or not judged."""
    fair = {one.ended.fate: {"fair_sample": one.fair} for one in left_out(endings)}
    return {name: ended.to_json() | fair.get(name, {}) for name, ended in endings.items()}


def gap(some: Lengths | None, others: Lengths | None) -> Gap | None:
    """Two groups' means, and where that of the first would lie, were it drawn from both at random without replacement.

    The variance of such a mean is s² / n · (N - n) / (N - 1), with s² of all N. Means are taken to be normal: good
    enough for some dozens, and of one or two whose length many have it calls nothing.
    """
    if some is None or others is None:
        return None
    n, whole = some.known, some.known + others.known
    mean = (n * some.mean + others.known * others.mean) / whole
    squares = sum(one.known * (one.sd**2 + (one.mean - mean) ** 2) for one in (some, others))
    half = _Z * math.sqrt(squares / whole / n * (whole - n) / (whole - 1))
    return Gap(some.mean, others.mean, mean - half, mean + half)


def words(one: UntrainedEnding) -> str:
    """One ending that was left out, in a sentence or three."""
    ended, trained = one.ended, one.trained
    what = MEANINGS.get(ended.fate, "")
    text = f"{ended.fate}{f' ({what})' if what else ''}: {ended.rollouts:,}, {ended.share:.1%} of them and the trained"
    means = []
    if one.trainable is not None:
        means.append(f"{_against(ended.trainable, trained.trainable)} to train on")
    if one.generated is not None:
        means.append(f"{_against(ended.generated, trained.generated)} written")
    text += f". Mean tokens (± sd) against the trained: {'; '.join(means)}" if means else ". Lengths not recorded"
    if ended.at_limit:
        text += (
            f". At the length limit: {ended.at_limit:,} of {ended.rollouts:,}, of the trained {trained.at_limit:,} of "
            f"{trained.rollouts:,}"
        )
    if one.fair is False:
        kinds = {"to train on": one.trainable, "written": one.generated}
        ranges = [f"{gap.low:.1f} to {gap.high:.1f} {kind}" for kind, gap in kinds.items() if gap and not gap.fair]
        text += f". NOT A FAIR SAMPLE: as many drawn at random have {' and '.join(ranges)}"
    return text


def _against(some: Lengths | None, others: Lengths | None) -> str:
    assert some is not None and others is not None  # there is a gap
    return f"{some.mean:.1f} ± {some.sd:.1f} against {others.mean:.1f} ± {others.sd:.1f}"
