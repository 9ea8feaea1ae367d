"""The cuts of a run as an audit sees them: which are looked at, of what class they are, and what each is compared with.

From a run's folder alone, no torch. Lengths and places are in tokens of the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.draws import uniform_bits
from common.runfiles.records import BookLine, Trace
from common.runfiles.run import RunFolder
from common.wire.messages import Ints
from ops.tasks.verifiers import after_thought

BEFORE, AFTER, LOOP = "before the answer", "after the answer", "in a loop"
CLASSES = (BEFORE, AFTER, LOOP)
COPIES, LEAST_TOKENS = 3, 12
"""A loop is so many copies in a row, and so many tokens of them in all."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A rollout that has a verdict. `trigger`: tokens seen when the policy fired; all of them where it did not.

    `written`: tokens on record. `fired`: whether there was a cut, applied or not. `active`: whether the policy could
    have cut it. `version`: that wrote its first token. `whole`: whether its text was right in the end; None where it
    was stopped before its end, or there is no verdict.
    """

    rid: str
    arm: str
    problem: int
    version: int
    keep: int
    trigger: int
    written: int
    fired: bool
    active: bool
    whole: bool | None


def read_records(run: RunFolder, books: Iterable[BookLine]) -> list[Recorded]:
    """All booked rollouts of traces.jsonl, in the order they were booked. Raises ConfigError for a damaged line."""
    booked = {line.rid: line for line in books}
    return [_record(trace, booked[trace.rid]) for trace in run.traces() if trace.rid in booked]


def read_tokens(run: RunFolder, rids: Collection[str]) -> dict[str, Ints]:
    """Tokens on record, int32 [written], of these rollouts: the file may be far larger than memory. Raises ConfigError
    for a damaged line."""
    return {trace.rid: trace.tokens for trace in run.traces(rids)}


def _record(trace: Trace, booked: BookLine) -> Recorded:
    return Recorded(
        rid=trace.rid,
        arm=trace.arm,
        problem=trace.problem,
        version=trace.version,
        keep=trace.keep,
        trigger=trace.trigger,
        written=trace.written,
        fired=trace.fired,
        active=booked.active,
        whole=None if trace.stopped else booked.correct,
    )


def chosen(cuts: Sequence[Recorded], most: int, seed: int) -> list[Recorded]:
    """At most `most` of the cuts, spread over the run: one drawn from each of `most` equal stretches of it."""
    if len(cuts) <= most:
        return list(cuts)
    ends = [len(cuts) * place // most for place in range(most + 1)]
    return [cuts[begin + uniform_bits(seed, "audit:cut", begin) % (end - begin)] for begin, end in pairwise(ends)]


def matched(cuts: Sequence[Recorded], records: Sequence[Recorded], seed: int) -> list[Recorded | None]:
    """For each cut a rollout that was still going, and not cut, when the policy fired in this one; None without any.

    Among those that the policy could have cut the nearest is taken: of the same prompt if there is one, then of the
    nearest policy version, then of the same arm, then by draw. Each is taken once; cuts choose in their order.
    """
    luck = {one.rid: uniform_bits(seed, f"audit:reference:{one.rid}") for one in records if one.active}
    free = {one.rid: one for one in records if one.active}
    found: list[Recorded | None] = []
    for cut in cuts:
        best = _nearest(cut, free.values(), luck)
        found.append(best)
        if best is not None:
            del free[best.rid]
    return found


def _nearest(cut: Recorded, records: Iterable[Recorded], luck: Mapping[str, int]) -> Recorded | None:
    # `trigger` is where a rollout was cut, or its end: before that it was going and not cut, whatever came later.
    going = (one for one in records if one.trigger > cut.trigger)
    return min(going, key=lambda one: _distance(one, cut, luck), default=None)


def _distance(one: Recorded, cut: Recorded, luck: Mapping[str, int]) -> tuple[bool, int, bool, int]:
    return one.problem != cut.problem, abs(one.version - cut.version), one.arm != cut.arm, luck[one.rid]


# --- classes ----------------------------------------------------------------------------------------------------------


def class_of(tokens: Ints, keep: int, trigger: int, answer: int | None) -> str:
    """After the answer: the kept tokens hold it whole (`answer`, as in `answer_tokens`). In a loop: not so, and
    what was written up to the trigger ends in one. Before the answer: neither."""
    if answer is not None and answer <= keep:
        return AFTER
    return LOOP if ends_in_loop(tokens[:trigger]) else BEFORE


@dataclass(frozen=True, slots=True)
class Reader:
    """How a rollout's tokens are read: `text` decodes them, `right` is the verifier's verdict on them, `end` gives the
    offset after the answer in a text, None without one."""

    text: Callable[[Ints], str]
    right: Callable[[Ints], bool | None]
    end: Callable[[str], int | None]


def answer_tokens(tokens: Ints, keep: int, reader: Reader) -> int | None:
    """The number of tokens that hold the answer; None without one.

    Where the kept tokens are right by themselves, or else all are, it is a number of tokens that is right while one
    less is not: at most `keep` in the first case, above it in the second. So an answer that is repeated counts from the
    first time, and `katana replay` asks the same of what is kept. A text that is right nowhere has its first complete
    answer, right or wrong, after its thought.
    """
    for low, high in ((0, keep), (keep, len(tokens))):
        if reader.right(tokens[:high]):
            return _bisected(low, high, lambda count: reader.right(tokens[:count]))
    whole = reader.text(tokens)
    thought = len(whole) - len(after_thought(whole))
    return _first_answer(tokens, lambda count: reader.text(tokens[:count])[thought:], reader.end)


def _first_answer(tokens: Ints, text: Callable[[int], str], end: Callable[[str], int | None]) -> int | None:
    # Once a text holds an answer so does every longer one.
    if end(text(len(tokens))) is None:
        return None
    high = _bisected(0, len(tokens), lambda count: end(text(count)) is not None)
    while high < len(tokens) and _grows(text(high), text(high + 1), end):
        high += 1
    return high


def _bisected(low: int, high: int, holds: Callable[[int], bool | None]) -> int:
    """A number above `low` for which it holds, and not for one less: it holds for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _grows(shorter: str, longer: str, end: Callable[[str], int | None]) -> bool:
    """Whether the next token belongs to the answer: 1 is an answer, and of 16 the beginning."""
    before, after = end(shorter), end(longer)
    return before == len(shorter) and after is not None and after > len(shorter)


def ends_in_loop(tokens: Ints) -> bool:
    """Whether the last tokens are at least three copies in a row of the same p tokens, for any p, 12 tokens or more.

    The last copy may be begun anywhere: tokens[i] = tokens[i - p] for all but the first p of the last max(3p, 12).
    """
    for period in range(1, len(tokens) // COPIES + 1):
        tail = tokens[-max(COPIES * period, LEAST_TOKENS) :]
        if len(tail) >= LEAST_TOKENS and np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
