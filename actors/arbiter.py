"""The arbiter: reads scores, gives every rollout exactly one verdict, signals its writer to stop. No torch.

Invariant: the pending entries of `scores` are this process's state. A rollout's notices are acknowledged with its
verdict and not before, so that a new arbiter reads the same notices and gives the same verdicts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from common import metrics, policies, tracing
from common.config import Config
from common.failing import brief
from common.policies import Policy, Progress, ScoredTokens, Situation
from common.termination import Cut, Kat, MinimaBuffer
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import (
    ChunkTokens,
    Floats,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreView,
    Verdict,
    read_number,
    read_rid,
)
from common.wire.plane import Plane, shown, unix_s
from common.wire.scripts import Fenced, Judged, Look
from common.wire.weights import BadWeights, read_pointer

log = logging.getLogger("katana.arbiter")
_AHEAD = 4  # chunks of a rollout that one round trip reads
_AT_ONCE = 64  # rollouts that one script reads: Redis does nothing else meanwhile
_MOST_IN_A_ROW = 5  # the policy failed on so many rollouts without a verdict between them: the policy is at fault


class PolicyBroken(RuntimeError):
    """The policy raises on every rollout."""


def _read_threshold(value: bytes | None) -> float | None:
    """The threshold on a rollout's record. Raises MessageError."""
    if value in (None, b"inactive"):
        return None
    try:
        threshold = float(value or b"")
    except ValueError as error:
        raise MessageError(f"threshold: {value!r:.40} is not a number") from error
    if not math.isfinite(threshold):
        raise MessageError(f"threshold: {threshold} is not finite")
    return threshold


def _read_view(tokens: ChunkTokens, stored: bytes) -> Floats:
    """The view of a chunk, float32 [3, n]. Raises MessageError."""
    if not stored:
        raise MessageError(f"chunk {tokens.seq}: its score has no view; a teacher of an earlier version stored it")
    view = ScoreView.decode(stored).view
    if view.shape[1] != len(tokens.tokens):
        raise MessageError(f"chunk {tokens.seq}: tokens and view do not match")
    return view


@dataclass(slots=True)
class _Track:
    """A rollout without a verdict: what has been read of it."""

    entries: list[bytes] = field(default_factory=list)
    head: RolloutHead | None = None
    threshold: float | None = None
    detector: Policy | None = None
    minimum: Kat | None = None  # sees every window, also those after the would-be cut; may be the detector itself
    cut: Cut | None = None
    chunks: list[ChunkTokens] = field(default_factory=list)
    divergence: list[ScoreDivergence] = field(default_factory=list)
    views: list[Floats] = field(default_factory=list)  # if they are read
    scored: int = 0  # tokens
    shared: bool = False  # detector and minimum are one


@dataclass(slots=True)
class _Calibration:
    """With several data servers, what the next `calibrate` of a teacher is made of."""

    minima: dict[str, float] = field(default_factory=dict)  # by rollout, of the verdicts that are due
    sent: float | Literal[""] | None = ""  # the threshold that all servers have; '' : unknown
    number: int = 0


@dataclass(slots=True)
class _Buffer:
    """Window minima of the rollouts of a teacher, and its threshold: divergences from one say nothing of another's."""

    minima: MinimaBuffer
    calibration: _Calibration = field(default_factory=_Calibration)


class Arbiter:
    """Reads `scores`, writes verdicts. Only one acts on a run at a time: the holder of the lease `arbiter`.

    `version`: the newest policy version that could be read.
    """

    def __init__(self, config: Config, plane: Plane, stop: threading.Event) -> None:
        self._settings, self._plane, self._stop = config.termination, plane, stop
        self._lease = Lease(plane, "arbiter", config.liveness.lease_s)
        self._max_attempts = config.liveness.max_attempts
        self._in_order = config.deterministic
        self._tracks: dict[str, _Track] = {}
        self._again: set[str] = set()
        self._blamed: set[str] = set()  # rollouts that the policy failed on since the last verdict
        self._careful = False
        self._buffers = {name: _Buffer(MinimaBuffer(self._settings.buffer_size)) for name in plane.teachers}
        self._policy = policies.find(self._settings.policy)
        self._views = bool(self._policy.reads) or config.feeder.record_views
        self.version = self._step = 0
        self._refused: dict[str, str] = {}  # the last malformed policy pointer that was reported
        # Calls to send at the end of this pass, each with its verdict and last notice (None: only acknowledge).
        self._due: list[tuple[Fenced[Judged], tuple[Verdict, bytes] | None]] = []
        self._recent: deque[bool] = deque(maxlen=256)
        self._calibrates_apart = len(plane.parts) > 1  # not in the script of a verdict, which is on one server

    def run(self, *, until_idle: bool = False) -> None:
        """Serve until stopped or until the run has ended. Raises LeaseLost, RunGone, RedisUnavailable, Stopping."""
        self.open()
        try:
            while not self._stop.is_set():
                busy = self.step(block_s=0.01 if until_idle else 0.2)
                if not busy and (until_idle or self._plane.state() == "ended"):
                    return
        finally:
            self.close()

    def open(self) -> None:
        """Acquire the lease, and judge what a former arbiter left, one rollout at a time: one may have crashed it."""
        self._lease.acquire(self._stop)
        try:
            self.version = self._policy_version()
            self._load_minima()
            self._show_threshold()
            if self._calibrates_apart:
                self._calibrate([])
            self._careful = True
            self._judge(self._note(self._lease.adopt("scores", "arbiter")))
            self._careful = False
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lease.drop()

    def step(self, block_s: float) -> bool:
        """Read new notices and judge their rollouts. True if there were any."""
        self._lease.keep()
        self.version = self._policy_version()
        came = self._plane.read("arbiter", self._lease.token, ["scores"], count=512, block_s=block_s)
        touched = self._note([entry for _, entry in came])
        if self._lease.adoption_due:
            touched |= self._note(self._lease.adopt("scores", "arbiter"))
        touched |= self._again
        self._again = set()
        with tracing.span("judging", rollouts=len(touched)) if touched else nullcontext():
            self._judge(touched)
        return bool(touched)

    def threshold_of(self, teacher: str = "") -> float | None:
        """The policy's number (kat: the threshold s) for rollouts of a teacher whose first score is stored from now on,
        or None."""
        minima = self._buffers[teacher].minima
        number = self._policy.number(self._settings, Progress(self.version, self._step, minima))
        return None if number is None else float(number)

    def _policy_version(self) -> int:
        pointer = self._plane.policy()
        try:
            announced = read_pointer(pointer)
        except BadWeights as error:
            if pointer != self._refused:
                metrics.dead_letters.labels("weights").inc()
                log.warning("ignored, continuing with version %d: %s", self.version, error)
            self._refused = pointer
            return self.version
        step = pointer.get("step", "")
        self._step = int(step) if step.isdecimal() else self._step
        return announced[0].version if announced else 0

    def _load_minima(self) -> None:
        for name, buffer in self._buffers.items():
            buffer.minima = MinimaBuffer(self._settings.buffer_size, self._plane.minima(name))

    def _note(self, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> set[str]:
        touched = set()
        for entry, values in entries:
            try:
                rid = read_rid(values.get(b"rid"))
            except MessageError as error:
                at = ("scores", "arbiter", entry)
                self._plane.fail("", "scores", str(error), max_attempts=1, shown=shown(values), at=at)
                continue
            self._tracks.setdefault(rid, _Track()).entries.append(entry)
            touched.add(rid)
        return touched

    def _judge(self, touched: set[str]) -> None:
        if not self._in_order:
            self._look(touched)
            return
        # Deterministic: minima and trajectories follow the order of admission, so a verdict that is due may wait.
        unjudged = self._unjudged()
        self._look(set(self._tracks).difference(unjudged))  # ended without our verdict: only acknowledged
        for rid in unjudged:
            if rid not in self._tracks:
                return
            self._look({rid})
            if rid in self._tracks:
                return

    def _unjudged(self) -> list[str]:
        """Rollouts without a verdict, in the order of admission."""
        rids = self._plane.open_rollouts()
        answers = self._plane.fields((rid, ["head", "verdict"]) for rid in rids)
        return [rid for rid, (head, verdict) in zip(rids, answers, strict=True) if head and verdict is None]

    def _look(self, rids: set[str]) -> None:
        """Judge rollouts. If careful, one at a time with its attempts counted: a rollout that ends arbiters dies."""
        if not self._careful:
            self._look_together(rids)
            return
        for rid in sorted(rids):
            begun = self._plane.attempt(rid, "arbiter")
            if begun > self._max_attempts:
                reason = f"{begun - 1} arbiters ended while judging only this rollout"
                self._report(rid, self._tracks[rid], reason, max_attempts=1)
            self._look_together({rid} & set(self._tracks))
            self._plane.attempt_over(rid, "arbiter")
        self._send_due()

    def _look_together(self, rids: set[str]) -> None:
        """Read each rollout from where the last read ended, a few chunks per round trip, until there are no more."""
        left = sorted(rids)
        while left:
            asked = [(rid, len(self._tracks[rid].chunks)) for rid in left]
            together = self._plane.by_server(asked, lambda one: one[0])
            parts = [some[at : at + _AT_ONCE] for some in together for at in range(0, len(some), _AT_ONCE)]
            looks = self._plane.call_all([scripts.look(_AHEAD, part, views=self._views) for part in parts])
            found = zip(chain.from_iterable(parts), chain.from_iterable(looks), strict=True)
            left = [rid for (rid, _), look in found if self._read_on(rid, look)]
            self._send_due()

    def _read_on(self, rid: str, look: Look) -> bool:
        """Add new chunks and judge; True if there may be more to read."""
        track = self._tracks[rid]
        if look.head is None or look.judged:
            self._acknowledge(rid)
            return False
        try:
            self._absorb(track, look)
            due = self._verdict(rid, track, look)
            body = due.encode() if due is not None else b""
        except MessageError as error:
            self._report(rid, track, str(error))
            return False
        except Exception as error:  # a custom policy may raise anything
            self._blame_policy(rid, track, error)
            return False
        if due is None:
            return len(look.scored) == (3 if self._views else 2) * _AHEAD
        self._give(track, due, body)
        return False

    def _absorb(self, track: _Track, look: Look) -> None:
        if track.head is None:
            self._begin(track, look)
        assert track.detector is not None and track.minimum is not None
        parts = 3 if self._views else 2
        for place in range(0, len(look.scored), parts):
            tokens, scores = ChunkTokens.decode(look.scored[place]), ScoreDivergence.decode(look.scored[place + 1])
            if len(tokens.tokens) != len(scores.divergence) or tokens.start != track.scored:
                raise MessageError(f"chunk {tokens.seq}: tokens and divergences do not match")
            view = _read_view(tokens, look.scored[place + 2]) if self._views else None
            track.chunks.append(tokens)
            track.divergence.append(scores)
            if view is not None:
                track.views.append(view)
            track.scored += len(tokens.tokens)
            fed = ScoredTokens(tokens.tokens, scores.divergence, view)
            if track.cut is not None or not track.shared:
                track.minimum.feed(fed.row(self._policy.windows_of))
            if track.cut is None:
                track.cut = track.detector.feed_tokens(fed)

    def _begin(self, track: _Track, look: Look) -> None:
        head = RolloutHead.decode(look.head if isinstance(look.head, bytes) else b"")
        if head.scored_by not in self._buffers:
            raise MessageError(f"head.teacher: {head.scored_by!r} is no teacher of this run")
        track.head = head
        track.threshold = _read_threshold(look.threshold)
        situation = Situation(track.threshold, track.head.seed, track.head.max_new_tokens)
        track.detector = self._policy(self._settings, situation)
        track.minimum = policies.extremes_beside(track.detector, self._settings)
        track.shared = isinstance(track.detector, Kat) and track.minimum is track.detector

    def _blame_policy(self, rid: str, track: _Track, error: Exception) -> None:
        """Count a failure of the rollout. Raises PolicyBroken if the policy fails on several in a row."""
        reason = f"policy {self._settings.policy}: {brief(error)}"
        self._blamed.add(rid)
        if len(self._blamed) >= _MOST_IN_A_ROW:
            raise PolicyBroken(f"{reason}; on {len(self._blamed)} rollouts, and no verdict between them") from error
        self._report(rid, track, reason)

    def _report(self, rid: str, track: _Track, reason: str, max_attempts: int | None = None) -> None:
        log.warning("rollout %s cannot be judged: %s", rid, reason)
        if self._plane.fail(rid, "arbiter", reason, max_attempts=max_attempts or self._max_attempts):
            self._acknowledge(rid)
        else:
            self._tracks[rid] = _Track(entries=track.entries)
            self._again.add(rid)

    def _acknowledge(self, rid: str) -> None:
        track = self._tracks.pop(rid)
        self._due.append((self._call(rid, b"", 0, False, None, track.entries, ""), None))

    def _give(self, track: _Track, verdict: Verdict, body: bytes) -> None:
        del self._tracks[verdict.rid]
        self._blamed.clear()
        if track.head is not None and track.head.step is not None:
            self.version = self._step = track.head.step  # not the pointer's version, which also grows with each resume
        teacher = track.head.scored_by if track.head is not None else ""
        minimum = verdict.min_window if self._calibrates(verdict, teacher) else None
        if minimum is not None:
            self._buffers[teacher].minima.push(minimum)
        call = self._call(verdict.rid, body, verdict.train, verdict.stopped, minimum, track.entries, teacher)
        self._due.append((call, (verdict, track.entries[-1])))
        if self._calibrates_apart and minimum is not None:
            self._buffers[teacher].calibration.minima[verdict.rid] = minimum

    def _send_due(self) -> None:
        """Send the verdicts of this pass, in their order, in one round trip."""
        due, self._due = self._due, []
        failed = self._plane.failed_calls
        replies = self._lease.call_all([call for call, _ in due]) if due else []
        given = [(one, answer) for (_, one), answer in zip(due, replies, strict=True) if one is not None]
        # If an answer was lost and the call repeated, our own verdict is a duplicate.
        ours = (Judged.OK, Judged.DUPLICATE) if self._plane.failed_calls != failed else (Judged.OK,)
        ours_given = [one for one, answer in given if answer in ours]
        others = any(answer is not Judged.OK for _, answer in given)
        if self._calibrates_apart:
            self._calibrate([verdict.rid for verdict, _ in ours_given], again=others)
        elif others:
            self._load_minima()
        self._observe(ours_given)

    def _calibrate(self, judged: list[str], *, again: bool = False) -> None:
        """With several servers: add the minima of given verdicts to the home's buffers, and set the thresholds on all.

        It comes after the verdicts, so a crash between loses minima of that trip, and no verdict is given twice. Until
        the next pass of an arbiter the servers then have the threshold of before; a rollout is judged by its own.
        """
        for name in self._buffers:
            self._calibrate_one(name, judged)
        if again:  # another arbiter judged some of them: what it found is in the buffer, and what we found is not
            self._load_minima()
            self._calibrate([])

    def _calibrate_one(self, teacher: str, judged: list[str]) -> None:
        calibration = self._buffers[teacher].calibration
        minima = [calibration.minima[rid] for rid in judged if rid in calibration.minima]
        calibration.minima.clear()
        size, threshold = self._settings.buffer_size, self.threshold_of(teacher)
        places = self._plane.places if threshold != calibration.sent else self._plane.places[: 1 if minima else 0]
        if places:
            calibration.number += 1
            added = {0: minima}
            self._lease.call_all(
                [
                    scripts.calibrate(calibration.number, size, threshold, added.get(place, []), place, teacher)
                    for place in places
                ]
            )
            calibration.sent = threshold

    def _verdict(self, rid: str, track: _Track, look: Look) -> Verdict | None:
        """The verdict, if one is due: the rollout must be cut, or it has ended by itself and is completely scored."""
        assert track.head is not None and track.minimum is not None
        arm, settings, finish = track.head.arm, self._settings, look.finish
        cut = settings.stops(arm) and track.cut is not None
        if not cut and (not finish or len(track.chunks) < read_number(look.chunks, "chunks", low=1)):
            return None
        reason = track.cut.reason if cut and track.cut else (finish or b"").decode("ascii", "replace")
        tokens = np.concatenate([chunk.tokens for chunk in track.chunks])
        total = len(tokens)
        keep = track.cut.keep if track.cut else total
        # The minimum of a rollout that is not stopped covers all its windows, also those after a would-be cut.
        least = track.minimum.min_window_of_all
        if settings.stops(arm) and isinstance(track.detector, Kat):
            least = track.detector.min_window
        versions = [chunk.policy_version for chunk in track.chunks]
        return Verdict(
            rid=rid,
            arm=arm,
            problem=track.head.problem,
            finish_reason=reason,
            trigger=track.cut.trigger if track.cut else total,
            keep=keep,
            train=total if settings.trains_whole(arm) else keep,
            cut=cut,
            generated=read_number(look.length, "length") if finish else None,
            threshold=track.threshold,
            min_window=least,
            first_version=min(versions),
            last_version=max(versions),
            tokens=tokens,
            divergence=np.concatenate([scores.divergence for scores in track.divergence]),
            view=np.concatenate(track.views, axis=1) if self._views else None,
        )

    def _calibrates(self, verdict: Verdict, teacher: str) -> bool:
        if verdict.min_window is None:
            return False
        if self.threshold_of(teacher) is None:  # until the policy is active all minima count
            return True
        source = self._settings.calibrate_on
        return source == "all" or (verdict.arm == "control" if source == "control" else not verdict.stopped)

    def _call(
        self,
        rid: str,
        verdict: bytes,
        train: int,
        stop: bool,
        minimum: float | None,
        entries: list[bytes],
        teacher: str,
    ) -> Fenced[Judged]:
        size = self._settings.buffer_size
        if self._calibrates_apart or not verdict:
            return scripts.verdict(rid, verdict, train, stop, None, size, "", entries, teacher)
        return scripts.verdict(rid, verdict, train, stop, minimum, size, self.threshold_of(teacher), entries, teacher)

    def _show_threshold(self) -> None:
        for name, buffer in self._buffers.items():
            metrics.kat_buffer_size.labels(name).set(len(buffer.minima))
            threshold = self.threshold_of(name)
            shown = threshold is not None and self._policy.unit == "nats"
            metrics.kat_threshold.labels(name).set(threshold if shown and threshold is not None else float("nan"))

    def _observe(self, given: list[tuple[Verdict, bytes]]) -> None:
        self._show_threshold()
        now = 0.0
        if any(verdict.stopped for verdict, _ in given):
            now = self._plane.now_s()
        for verdict, entry in given:
            tracing.stage(verdict.rid, "verdict", tokens=len(verdict.tokens), keep=verdict.keep)
            self._observe_one(verdict, entry, now)

    def _observe_one(self, verdict: Verdict, entry: bytes, now: float) -> None:
        metrics.token_divergence.observe_all(verdict.divergence)
        if verdict.arm == "treated" and self._policy.active(verdict.threshold):
            self._recent.append(verdict.fired)
            metrics.kat_cut_rate.set(sum(self._recent) / len(self._recent))
        if verdict.fired:
            metrics.fired_position.labels(verdict.arm).observe(verdict.trigger)
        if verdict.stopped:
            metrics.stop_latency.observe(max(0.0, now - unix_s(entry)))
            metrics.stop_signals.labels(verdict.finish_reason).inc()
