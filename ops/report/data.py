"""The figures of the report, computed from a run's records: pure functions, no drawing.

Divergences are in nats per token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from common.config import ConfigError
from common.runfiles.records import BookLine, Evaluation, Trace
from common.runfiles.run import RunFolder

Floats = npt.NDArray[np.float64]
_T = TypeVar("_T")

# Smaller divergences are shown as this one: float32 rounds those of sharp distributions that agree to 0.
FLOOR_NATS = 1e-6


# --- tokens written, and accuracy over them ------------------------------------------------------------------------


def generated_at_steps(lines: Iterable[BookLine], batch_size: int) -> list[int]:
    """Tokens generated up to learner step 0, 1, 2 …: of all rollouts booked up to the step's last trajectory.

    Trained rollouts are booked when a checkpoint covers them, so between checkpoints a figure includes other rollouts
    booked in the meantime; at a checkpoint it is exact.
    """
    marks, total, trained = [0], 0, 0
    for line in lines:
        total += line.tokens_generated
        if line.ending == "trained":
            trained += 1
            if trained % batch_size == 0:
                marks.append(total)
    return marks


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An evaluated version: its step, tokens generated up to it, avg@k, pass@k."""

    step: int
    tokens: int
    avg_at_k: float
    pass_at_k: float


def accuracy_curve(evaluations: Iterable[Evaluation], marks: Sequence[int]) -> list[Accuracy]:
    """Evaluated versions by step, without those whose step is not in the books yet: their tokens are unknown."""
    known = sorted((one for one in evaluations if one.step < len(marks)), key=lambda one: one.step)
    return [Accuracy(one.step, marks[one.step], one.scores.avg_at_k, one.scores.pass_at_k) for one in known]


# --- length by arm -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Rollouts of one arm in a range of policy versions: mean version, mean tokens, half a 95 % interval of it."""

    version: float
    tokens: float
    half_width: float
    rollouts: int


def finished(lines: Iterable[BookLine]) -> list[BookLine]:
    """The rollouts that ended by themselves or by their policy: only they have a meaningful version and length."""
    return [line for line in lines if line.ending != "dead" and not line.ended_by_run and line.judged]


def bin_width(lines: Iterable[BookLine], most_bins: int = 16) -> int:
    """Policy versions in a bin, so that there are at most `most_bins`."""
    newest = max((line.policy_version_last for line in lines), default=0)
    return max(1, math.ceil((newest + 1) / most_bins))


def length_curve(lines: Iterable[BookLine], arm: str, width: int) -> list[LengthBin]:
    """Mean tokens generated of an arm's finished rollouts, by the version that wrote their last token."""
    bins: dict[int, list[BookLine]] = {}
    for line in finished(lines):
        if line.arm == arm:
            bins.setdefault(line.policy_version_last // width, []).append(line)
    return [_length_bin(bins[place]) for place in sorted(bins)]


def _length_bin(lines: Sequence[BookLine]) -> LengthBin:
    tokens = np.array([line.tokens_generated for line in lines], dtype=np.float64)
    error = float(tokens.std(ddof=1)) / math.sqrt(len(lines)) if len(lines) > 1 else 0.0
    version = sum(line.policy_version_last for line in lines) / len(lines)
    return LengthBin(version, float(tokens.mean()), 1.96 * error, len(lines))


def active_from(lines: Iterable[BookLine]) -> int | None:
    """The oldest policy version at which a rollout ended that the policy could have cut; None if there is none.

    The policy may become active while a rollout is being written, so the version that began it may be older.
    """
    return min((line.policy_version_last for line in lines if line.active), default=None)


def fired_share(lines: Iterable[BookLine]) -> tuple[int, int]:
    """Treated rollouts in which the policy fired, applied or not, and treated rollouts that could have been cut."""
    judged = [line for line in lines if line.compared and line.arm == "treated"]
    return sum(line.fired for line in judged), len(judged)


# --- where the tokens went -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fates:
    """An arm's generated tokens, each counted once."""

    trained: int
    unused: int
    detection: int
    overshoot: int

    @property
    def total(self) -> int:
        return self.trained + self.unused + self.detection + self.overshoot


def token_fates(lines: Iterable[BookLine], arm: str) -> Fates:
    """Tokens trained on; kept but not trained on; from the cut to the trigger; after the trigger.

    Complete control rollouts may be trained on (`control_trains: whole`), including the tokens after the cut.
    """
    sums = [0, 0, 0, 0]
    for line in lines:
        if line.arm == arm:
            trained, start = line.tokens_trained, 0
            sums[0] += trained
            for place, name in enumerate(("tokens_kept", "tokens_detection", "tokens_overshoot"), start=1):
                end = start + getattr(line, name)
                sums[place] += max(0, end - max(start, trained))
                start = end
    return Fates(*sums)


# --- traces --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TraceSample:
    """Traces of one kind, evenly spread over the run, and how many there are in total."""

    traces: list[Trace]
    found: int


def sample_traces(run: RunFolder, most: int) -> dict[str, TraceSample]:
    """At most `most` traces of each kind: treated | control (the policy fired), uncut (treated, it did not fire), and
    booked (all of them), in the order of booking.

    Only one trace at a time, and in the end the chosen ones, are in memory: those of a long run are gigabytes.
    """
    found: dict[str, list[int]] = {"treated": [], "control": [], "uncut": [], "booked": []}
    for place, trace in run.traces.placed():
        found["booked"].append(place)
        if trace.fired:
            found[trace.arm].append(place)
        elif trace.arm == "treated":
            found["uncut"].append(place)
    chosen = {kind: spread(places, most) for kind, places in found.items()}
    read = run.traces.at(sorted({place for places in chosen.values() for place in places}))
    return {kind: TraceSample([read[place] for place in chosen[kind]], len(found[kind])) for kind in found}


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """`count` items at equal distances, including the first and the last; all if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def heat_rows(traces: Sequence[Trace], count: int) -> list[Trace]:
    """Rows of the heat map: spread over the run, sorted by `keep`, the earliest cut on top."""
    return sorted(spread(traces, count), key=lambda trace: (trace.keep, len(trace.divergence)))


def shown_width(rows: Sequence[Trace]) -> int:
    """Token positions to show: all triggers and 90 % of the rollouts in full, so that a long one does not dominate."""
    lengths = sorted(len(trace.divergence) for trace in rows)
    return max(lengths[math.ceil(0.9 * len(lengths)) - 1], max(min(row.trigger, len(row.divergence)) for row in rows))


def heat_map(rows: Sequence[Trace], width: int) -> Floats:
    """log10 of the divergence in nats, float [rows, width]; NaN after a rollout's last scored token."""
    image = np.full((len(rows), width), np.nan)
    for row, trace in enumerate(rows):
        values = trace.divergence[:width].astype(np.float64)
        image[row, : len(values)] = np.log10(np.maximum(values, FLOOR_NATS))
    return image


def window_means(divergence: npt.NDArray[np.floating], window: int) -> Floats:
    """z_t = mean(d_{t-W+1} … d_t), float [n], nats; NaN before the first complete window."""
    values = divergence.astype(np.float64)
    means = np.full(len(values), np.nan)
    if len(values) >= window:
        means[window - 1 :] = np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)
    return means


def mean_divergences(traces: Iterable[Trace]) -> tuple[float | None, float | None, float | None]:
    """Mean divergence in nats per token: before the cut, from it to the trigger, after the trigger; None: no token."""
    parts: list[list[npt.NDArray[np.float32]]] = [[], [], []]
    for trace in traces:
        for part, piece in zip(parts, np.split(trace.divergence, [trace.keep, trace.trigger]), strict=True):
            part.append(piece)
    before, detection, after = (_mean(part) for part in parts)
    return before, detection, after


def _mean(pieces: Sequence[npt.NDArray[np.float32]]) -> float | None:
    count = sum(len(piece) for piece in pieces)
    return sum(float(piece.sum(dtype=np.float64)) for piece in pieces) / count if count else None


def typical(traces: Sequence[Trace]) -> Trace | None:
    """The trace with the median `keep` among those with kept tokens; of several the newest."""
    kept = [trace for trace in traces if trace.keep > 0] or list(traces)
    if not kept:
        return None
    middle = sorted(trace.keep for trace in kept)[len(kept) // 2]
    return [trace for trace in kept if trace.keep == middle][-1]


def cut_text(trace: Trace, decode: Callable[[list[int]], str], characters: int) -> tuple[str, str, str]:
    """Text around the cut, about `characters` long at most: end of the kept part, up to the trigger, after it."""
    tokens = trace.tokens.tolist()
    kept = visible(decode(tokens[: trace.keep]))
    detection = visible(decode(tokens[trace.keep : trace.trigger]))
    after = visible(decode(tokens[trace.trigger :]))
    third = characters // 3
    if len(kept) > third:
        kept = "…" + kept[-third:]
    if len(detection) > third:  # keep its end too, next to the text after the trigger
        detection = detection[: third - third // 3] + "…" + detection[-(third // 3) :]
    if len(after) > third:
        after = after[:third] + "…"
    return kept, detection, after


def visible(text: str) -> str:
    """The text on one line, with only printable characters."""
    return "".join(mark if mark.isprintable() else "·" for mark in text.replace("\n", "↵"))


# --- the caption ---------------------------------------------------------------------------------------------------


def reasons_text(lines: Iterable[BookLine]) -> str:
    """How often each finish reason occurs, most frequent first."""
    counts = Counter(line.finish_reason for line in lines)
    return " · ".join(f"{reason} {count:,}" for reason, count in counts.most_common()) or "none booked"


def ledger_text(run: RunFolder) -> str:
    """The ledger as a sum, and whether it adds up; or why there is none."""
    try:
        ledger = run.ledger
    except ConfigError:
        return "ledger.json cannot be read"
    if ledger is None:
        return "no ledger.json yet"
    why = ", ".join(f"{reason} {count:,}" for reason, count in sorted(ledger.dropped.items()))
    total = ledger.ended + ledger.open
    verdict = "adds up" if ledger.open else "closed"
    return (
        f"{ledger.admitted:,} admitted = {ledger.trained:,} trained + {sum(ledger.dropped.values()):,} dropped"
        f"{f' ({why})' if why else ''} + {ledger.dead:,} dead + {ledger.open:,} open "
        f"({verdict if total == ledger.admitted else f'DOES NOT ADD UP: {total:,}'})"
    )
