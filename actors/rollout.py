"""The rollout worker: generates admitted rollouts, sends their chunks, stops a rollout on a signal.

Generation continues while earlier chunks are scored, up to `max_unscored_chunks`. If Redis refuses a chunk, the slot
is freed, except when Redis is full. It refuses chunks of a former owner, of a stopped rollout and of an ended run.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from actors.blame import ALONE_AFTER, Blame, step_or_part
from actors.busy import BusyShare, Idling
from actors.engine import ClosedChunk, Shared, Writer
from actors.weights import Weights, WeightsReader
from common import metrics, tracing
from common.config import Config
from common.episode import Episode
from common.failing import brief
from common.policies import unwatched
from common.pulse import Pulse
from common.runfiles.names import WEIGHTS
from common.wire import scripts
from common.wire.exclusive import exclusively, numbered
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    Ints,
    MessageError,
    RolloutHead,
    read_number,
    read_rid,
    support_digest,
)
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping
from common.wire.record import tokens_field
from common.wire.scripts import Beat, Call, Counted, Given, Ownership, Stored, Written

log = logging.getLogger("katana.rollout")
_CONTROL_S = 0.01  # interval for reading signals, scored counts and the policy pointer, and for filling free slots
_EXCHANGE_SHARE = 0.25  # share of its time, at most, that a generating worker waits for the answers of Redis
_LONGEST_SILENCE_S = 0.5  # limit of the pause after a slow round trip
_LEAST_SILENCE_S = 0.02  # of a generating worker: its chunks of several steps go together
_LONGEST_IDLE_S = 2.0  # between two polls of a worker that has nothing to write


@dataclass(frozen=True, slots=True)
class _Taken:
    """A rollout that this worker now owns. `claims`: how often it was claimed from a silent worker without progress."""

    rid: str
    entry: bytes
    chunks: int
    length: int
    claims: int


@dataclass(slots=True)
class _Writing:
    """A rollout in a slot. `sent` and `scored` count chunks."""

    rid: str
    entry: bytes
    nonce: str
    sent: int
    scored: int
    lane: str  # of the stream of its teacher's chunks
    held: bool = False
    closed: list[tuple[ClosedChunk, int]] = field(default_factory=list)  # chunks to send, with their version
    refused: bool = False  # Redis was full and refused the first of them

    @property
    def owned(self) -> Written:
        return Written(self.rid, self.entry, self.nonce)

    @property
    def final(self) -> bool:
        """It has left its slot, and only its last chunks must be sent."""
        return bool(self.closed) and self.closed[-1][0].finish is not None


class RolloutWorker:
    """A rollout worker during one worker task. `version`: of its weights, -1 for none. `clock`: monotonic seconds."""

    def __init__(
        self,
        config: Config,
        plane: Plane,
        decoder: Writer,
        *,
        worker: str,
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._plane, self._decoder, self._worker, self._stop = config, plane, decoder, worker, stop
        self._clock = clock
        self._weights = WeightsReader(config.run_dir / WEIGHTS, plane.refuse, decoder.read_weights)
        self._writing: dict[str, _Writing] = {}
        self._counts: list[Call[Counted]] = []  # lengths of stopped rollouts, to be sent
        # By data server: signals that have been read, the last of them, and where the next claim begins.
        self._done: list[list[bytes]] = [[] for _ in plane.places]
        self._signal = [b"0-0" for _ in plane.places]
        self._claim_from = [b"0-0" for _ in plane.places]
        self._turn = 0  # the server that is asked first for rollouts
        self._exchange_at = 0.0
        self.version = self._step = -1
        self._busy = BusyShare()
        self._alone: list[str] = []  # rollouts to be written alone, while the others wait
        self._tried = ""  # the first of them, once its attempt is counted
        self._blame = Blame(decoder.prove, deed="written", model="student")
        self._idle = Idling(_CONTROL_S, min(_LONGEST_IDLE_S, config.liveness.heartbeat_s))
        self._full = Episode(log)
        self._written = decoder.decoded_tokens  # of them, counted
        self._due: dict[str, float] = {}
        self._kept = contextlib.ExitStack()  # until the end of the task
        live = config.liveness
        self._pulse = Pulse(self._report_alive, every_s=live.heartbeat_s, turn_s=live.claim_s, busy_s=live.busy_s)

    def serve(self, until: float) -> None:
        """Generate until `until` (monotonic seconds), the end of the run, or a stop; then release all rollouts."""
        try:
            with self._pulse:
                try:
                    if self.open():
                        while not self._stop.is_set() and self._clock() < until and self.step():
                            pass
                except Stopping:
                    log.info("stopped while waiting for Redis")
                finally:
                    self.close()
        finally:
            self._kept.close()
            self._plane.gone(self._worker, role="rollout", streams=["prompts"])

    def step(self) -> bool:
        """One iteration: heartbeat, signals, weights, refill, one engine step. False if the run has ended."""
        self._pulse.turn()
        if not self._exchange_if_due():
            return False
        self._try_alone()
        if all(one.held or self._waits_for_another(one.rid) for one in self._writing.values()):
            self._stop.wait(self._idle.pause_s)
            return True
        self._idle.worked()
        closed = self._write()
        self._close(closed)
        if closed and self._clock() >= self._exchange_at:
            # With control: if chunks close at every step, this may be the only round trip for a long time.
            return self._exchange(control=self._is_due("control", _CONTROL_S))
        return True

    @property
    def writing(self) -> tuple[str, ...]:
        """Rollouts in a slot, or with chunks still to be sent."""
        return tuple(self._writing)

    def _write(self) -> list[ClosedChunk]:
        """One engine step. For each rollout on which it fails an attempt is counted; the others continue."""
        with (
            self._pulse.busy("an engine step"),
            self._busy.work(),
            metrics.engine_step_seconds.labels("rollout").time(),
        ):
            closed, failures = step_or_part(
                self._decoder,
                [rid for rid in self._decoder.busy if not self._waits_for_another(rid)],
                may_economize=not self._config.deterministic,
            )
            written = self._decoder.decoded_tokens - self._written
            self._written += written
            tracing.note(rows=len(self._decoder.busy), tokens=written)
        metrics.decode_tokens.labels("rollout").inc(written)
        for rid, error in failures:
            if written:  # other rollouts succeeded, so the engine works however many fail
                self._blame.succeeded()
            self._count_failure(self._writing[rid], error)
        if written:
            self._blame.succeeded()
        return closed

    def _count_failure(self, writing: _Writing, error: Exception) -> None:
        """Count a failure of a single rollout. Raises EngineBroken if this process is at fault."""
        self._blame.of(writing.rid, error)
        self._decoder.discard(writing.rid)
        self._forget(writing.rid)
        self._release(writing.owned)
        self._give_up(writing.rid, brief(error), writing.entry)

    def _try_alone(self) -> None:
        """Write rollouts that may have ended their workers one at a time and alone, until a chunk of it is stored. One
        that ended `max_attempts` workers in this way is given up."""
        while self._alone and self._alone[0] != self._tried:
            writing = self._writing[self._alone[0]]
            begun, most = self._plane.attempt(writing.rid, "rollout"), self._config.liveness.max_attempts
            if begun <= most:
                self._tried = writing.rid
            else:
                self._forget(writing.rid)
                reason = f"{begun - 1} workers ended while writing only this rollout"
                self._give_up(writing.rid, reason, writing.entry, attempts=1)

    def _waits_for_another(self, rid: str) -> bool:
        """Whether another rollout is being written alone."""
        return bool(self._alone) and rid != self._alone[0]

    def _exchange_if_due(self) -> bool:
        """All communication with Redis that is due, in one round trip. False if the run has ended.

        On a connection with high latency a trip takes the time of many tokens, so the next one is delayed.
        """
        writing = any(not writing.held for writing in self._writing.values())
        if writing and self._clock() < self._exchange_at:
            return True
        return self._exchange(control=not writing or self._is_due("control", _CONTROL_S))

    def _exchange(self, *, control: bool) -> bool:
        """Send chunks and counts; with `control`, read signals, scored counts and weights, and take rollouts."""
        with tracing.span("exchange"):
            return self._exchange_now(control=control)

    def _exchange_now(self, *, control: bool) -> bool:
        free = self._free() if control else 0  # before `refused` is reset: a full Redis gets no new rollouts
        everyone = control and self._is_due("beat", self._config.liveness.heartbeat_s)
        if self._is_due("refused", 0.25):
            for one in self._writing.values():
                one.refused = False
        sent = [(one, *pair) for one in self._writing.values() if not one.refused for pair in one.closed]
        counts = list(self._counts)
        asked = self._asked(everyone) if control else []
        beats = [self._beat_call(place, some) for place, some in enumerate(asked)]
        nonce = secrets.token_hex(8)
        shares = self._shares(free)
        takes = [self._take_call(nonce, share, place) for place, share in shares]
        began = self._clock()
        tracing.note(chunks=len(sent), free=free)
        stored, _, answered, given = self._plane.trip(self._chunk_calls(sent), counts, beats, takes)
        now = self._clock()
        longest = min(_LONGEST_SILENCE_S, self._config.liveness.heartbeat_s / 2)
        self._exchange_at = now + max(min((now - began) * (1 / _EXCHANGE_SHARE - 1), longest), _LEAST_SILENCE_S)
        del self._counts[: len(counts)]
        for (one, chunk, _), answer in zip(sent, stored, strict=True):
            self._handle_answer(one, chunk, answer)
        for place, beat in enumerate(answered):
            self._handle_control(place, asked[place], beat)
        return all(self._begin_all(reply, nonce, place) for (place, _), reply in zip(shares, given, strict=True))

    def _asked(self, everyone: bool) -> list[list[_Writing]]:
        """The rollouts to ask about, by data server: all, or those that wait."""
        asked: list[list[_Writing]] = [[] for _ in self._plane.places]
        for one in self._writing.values():
            if everyone or one.held:
                asked[self._plane.place_of(one.rid)].append(one)
        return asked

    def _shares(self, free: int) -> list[tuple[int, int]]:
        """Which data servers are asked for how many of the free slots; the turn is for slots that cannot be shared."""
        servers = len(self._plane.places)
        first, self._turn = self._turn, (self._turn + 1) % servers
        shares = [((first + step) % servers, (free + servers - 1 - step) // servers) for step in range(servers)]
        return [(place, share) for place, share in shares if share]

    def _free(self) -> int:
        """Number of free slots; 0 while Redis is full."""
        if any(one.refused for one in self._writing.values()):
            return 0
        return self._decoder.free

    # --- what comes in -----------------------------------------------------------------------------------------

    def _take_call(self, nonce: str, free: int, place: int) -> Call[Given]:
        claim = self._plane.may_claim and self._is_due(f"claim {place}", self._config.liveness.heartbeat_s)
        idle_ms = int(self._config.liveness.claim_s * 1000) if claim else 0
        return scripts.take(self._worker, nonce, free, idle_ms, self._claim_from[place], place)

    def _begin_all(self, given: Given, nonce: str, place: int) -> bool:
        """Start the rollouts that a data server gave. False if the run has ended."""
        if given.ended:
            return False
        self._claim_from[place] = given.claim_from
        taken = []
        for offer in given.offers:
            known, most = "", self._config.max_length  # a chunk has at least a token
            try:
                known = read_rid(offer.rid)
                if offer.claims is None:
                    raise MessageError("rollout.claims: not a number")
                chunks = read_number(offer.chunks, "rollout.chunks", high=most)
                length = read_number(offer.length, "rollout.length", high=most)
                taken.append(_Taken(known, offer.entry, chunks, length, offer.claims))
            except MessageError as error:
                if known:
                    self._release(Written(known, offer.entry, nonce))
                self._give_up(known, str(error), offer.entry)
        names = [(one.rid, ["head", "scored", *map(tokens_field, range(one.chunks))]) for one in taken]
        for one, fields in zip(taken, self._plane.fields(names), strict=True):
            self._start(one, nonce, fields)
        metrics.slots_busy.labels("rollout").set(len(self._decoder.busy))
        return True

    def _start(self, taken: _Taken, nonce: str, fields: list[bytes | None]) -> None:
        if taken.claims:
            metrics.claims.labels("prompts").inc()
            log.info("rollout %s taken over at token %d", taken.rid, taken.length)
        head_bytes, scored, *chunks = fields
        if head_bytes is None:
            return  # ended between the two calls
        # This worker may claim its own rollout after a stall: it is then continued from the record.
        if taken.rid in self._writing:
            self._forget(taken.rid)
        try:
            head = RolloutHead.decode(head_bytes)
            done = read_number(scored or b"0", "rollout.scored")
            if head.scored_by not in self._plane.teachers:
                raise MessageError(f"head.teacher: {head.scored_by!r}; the run has {', '.join(self._plane.teachers)}")
            lane = self._plane.lane_of(taken.rid, head.scored_by)
            writing = _Writing(taken.rid, taken.entry, nonce, taken.chunks, done, lane)
            if not self._has_weights_of(head.step):
                self._release(Written(taken.rid, taken.entry, nonce))
                return
            rule, most = self._config.termination, head.max_new_tokens
            self._decoder.add(
                taken.rid,
                head.prompt,
                seed=head.seed,
                max_new_tokens=most,
                generated=_join(chunks),
                unwatched=unwatched(rule, arm=head.arm, seed=head.seed, max_tokens=most),
            )
        except (MessageError, ValueError) as error:
            self._release(Written(taken.rid, taken.entry, nonce))
            self._give_up(taken.rid, str(error), taken.entry)
            return
        self._writing[taken.rid] = writing
        tracing.stage(taken.rid, "taken")
        if taken.claims >= ALONE_AFTER:
            self._alone.append(taken.rid)
        self._hold_or_release(writing)

    def _give_up(self, rid: str, reason: str, entry: bytes, attempts: int | None = None) -> None:
        log.warning("rollout %s cannot be written: %s", rid or "?", reason)
        attempts = attempts or (self._config.liveness.max_attempts if rid else 1)
        self._plane.fail(rid, "rollout", reason, max_attempts=attempts, at=("prompts", "rollout", entry))

    def _release(self, *written: Written) -> None:
        """Release rollouts: the next worker that asks takes them."""
        together = self._plane.by_server(written, lambda one: one.rid)
        self._plane.call_all([scripts.release(self._worker, some) for some in together])

    def _beat_call(self, place: int, asked: list[_Writing]) -> Call[Beat]:
        return scripts.beat(self._worker, self._signal[place], self._done[place], [one.owned for one in asked], place)

    def _handle_control(self, place: int, asked: list[_Writing], beat: Beat) -> None:
        """Read signals and weights, and for the rollouts `asked`: scored counts, endings, lost ownership."""
        self._done[place] = [entry for entry, _ in beat.signals]
        for entry, rid in beat.signals:
            self._signal[place] = entry
            if rid in self._writing:
                self._end(rid)
        for one, standing in zip(asked, beat.standings, strict=True):
            if self._writing.get(one.rid) is not one:
                continue  # ended by one of its own chunks, or by a signal
            if standing.ownership is Ownership.ENDED:
                self._end(one.rid)
            elif standing.ownership is Ownership.LOST:
                self._forget(one.rid)
            else:
                self._learn_scored(one, standing.scored)
        # Deterministic: weights change only when a rollout needs it (`_start`), so no chunk is closed early.
        if place == 0 and not self._config.deterministic:
            self._follow(beat.policy, wait=self.version < 0)

    def _learn_scored(self, writing: _Writing, scored: bytes | None) -> None:
        try:
            known, writing.scored = writing.scored, read_number(scored or b"0", "rollout.scored")
            if writing.scored > known:
                tracing.stage(writing.rid, "seen", seq=writing.scored - 1)
        except MessageError as error:
            self._forget(writing.rid)
            self._release(writing.owned)
            self._give_up(writing.rid, str(error), writing.entry)
            return
        self._hold_or_release(writing)

    def _hold_or_release(self, writing: _Writing) -> None:
        unscored = writing.sent + len(writing.closed) - writing.scored
        hold = writing.final or writing.refused or unscored >= self._config.rollout.max_unscored_chunks
        if hold != writing.held:
            writing.held = hold
            if not writing.final:  # else it has left its slot
                (self._decoder.hold if hold else self._decoder.release)(writing.rid)

    def _end(self, rid: str, final: ClosedChunk | None = None) -> None:
        """The rollout has its verdict: free the slot, and report its length including the current chunk."""
        writing = self._writing[rid]
        generated = self._forget(rid) or (final.start + len(final.tokens) if final else 0)
        self._counts.append(scripts.count(rid, writing.nonce, generated))

    def _came_through(self, rid: str) -> None:
        """Write it with the others again: a chunk of it is stored, or it is not ours any more."""
        if rid in self._alone:
            self._alone.remove(rid)
        if rid == self._tried:
            self._tried = ""

    def _forget(self, rid: str) -> int:
        """Drop a rollout; returns how many of its tokens were written."""
        writing = self._writing.pop(rid)
        self._came_through(rid)
        if rid in self._decoder.busy:
            return self._decoder.remove(rid)
        last = writing.closed[-1][0] if writing.closed else None
        return last.start + len(last.tokens) if last else 0

    # --- what goes out -----------------------------------------------------------------------------------------

    def _close(self, closed: list[ClosedChunk]) -> None:
        """Queue chunks that the decoder closed; the next round trip sends them."""
        for chunk in closed:
            if (writing := self._writing.get(chunk.key)) is not None:
                writing.closed.append((chunk, self.version if chunk.version is None else chunk.version))
                self._hold_or_release(writing)

    def _chunk_calls(self, sent: list[tuple[_Writing, ClosedChunk, int]]) -> list[Call[Stored]]:
        """Calls that send chunks, in order within each rollout."""
        ahead: Counter[str] = Counter()
        calls: list[Call[Stored]] = []
        for one, chunk, version in sent:
            calls.append(self._chunk_call(one, chunk, version, one.sent + ahead[one.rid]))
            ahead[one.rid] += 1
        return calls

    def _chunk_call(self, writing: _Writing, chunk: ClosedChunk, version: int, seq: int) -> Call[Stored]:
        support = ChunkSupport(
            support_ids=chunk.support_ids,
            rollout_logprobs=chunk.rollout_logprobs,
            sampled_logprobs=chunk.sampled_logprobs,
        ).encode()
        logprobs = ChunkLogprobs(support_logprobs=chunk.support_logprobs, tail_logprobs=chunk.tail_logprobs).encode()
        tokens = ChunkTokens(
            seq=seq,
            start=chunk.start,
            policy_version=version,
            finish=chunk.finish,
            writer=writing.nonce,
            digest=support_digest(support, logprobs),
            tokens=chunk.tokens,
        ).encode()
        length = chunk.start + len(chunk.tokens)
        own = (writing.rid, writing.nonce, seq, tokens, support, logprobs)
        return scripts.chunk(*own, writing.lane, length, chunk.finish)

    def _handle_answer(self, writing: _Writing, chunk: ClosedChunk, stored: Stored) -> None:
        if writing.refused or self._writing.get(writing.rid) is not writing:
            return  # it follows a refused chunk
        if stored.word is scripts.ChunkAnswer.FULL:
            metrics.chunks_refused.inc()
            self._full.seen("Redis is full: chunks wait until trained and ended rollouts are removed")
            writing.refused = True
            self._hold_or_release(writing)
            return
        del writing.closed[0]
        if stored.word is scripts.ChunkAnswer.OK:
            metrics.chunks_sent.inc()
            tracing.stage(writing.rid, "chunk", seq=writing.sent, tokens=len(chunk.tokens))
            self._full.not_seen("Redis accepts chunks again")
            writing.sent += 1
            self._came_through(writing.rid)
            if chunk.finish:
                del self._writing[writing.rid]
            else:
                self._learn_scored(writing, stored.scored)
            return
        metrics.chunks_fenced.inc()
        if stored.word is scripts.ChunkAnswer.ENDED:
            self._end(writing.rid, chunk)
        else:
            self._forget(writing.rid)

    # --- weights -----------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Make the writer ready, and load the newest weights, before taking rollouts. False if the run ends or the
        worker is stopped first."""
        with self._pulse.busy("making the writer ready"):
            if not self._decoder.attach(self._shared()):
                return False
        metrics.slots_total.labels("rollout").set(self._decoder.slots)
        while not self._stop.is_set():
            self._follow(self._plane.policy(), wait=True)
            if self.version >= 0:
                return True
            if self._plane.state() != "open":
                return False
            self._stop.wait(0.1)
        return False

    def _shared(self) -> Shared:
        def pause(seconds: float) -> bool:
            self._pulse.turn()
            return self._stop.wait(seconds)

        return Shared(
            run=self._plane.run_key,
            weights=self._config.run_dir / WEIGHTS,
            number=lambda: self._kept.enter_context(numbered(self._plane)),
            exclusively=lambda what: exclusively(self._plane, what, pause),
            pause=pause,
        )

    def _has_weights_of(self, step: int | None) -> bool:
        """Swap weights if a rollout needs those of another step. All rollouts in slots are then of an earlier step:
        they have their verdicts, and their chunks are refused anyway."""
        if step is not None and step != self._step:
            self._follow(self._plane.policy(), step, wait=True)
        return step in (None, self._step)

    def _follow(self, pointer: dict[str, str], step: int | None = None, *, wait: bool) -> None:
        """Swap in the announced weights once they are read; with `step`, only those of that step."""
        with self._pulse.busy("reading weights") if wait else contextlib.nullcontext():
            newer = self._weights.newer(pointer, self.version, step=step, wait=wait)
        if newer is not None:
            self._swap(newer)

    def _swap(self, weights: Weights) -> None:
        """Swap in other weights; every open chunk is closed first."""
        self._close(self._decoder.close_chunks())
        with self._pulse.busy("swapping weights"):
            self._decoder.swap(weights.content, weights.version)
        self.version, self._step = weights.version, weights.step
        metrics.policy_version.labels("rollout").set(weights.version)

    # --- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close and send open chunks, then release the rollouts: the order makes their records complete."""
        try:
            # Deterministic: chunks are not closed early; the next worker writes the open ones again, bit for bit.
            if not self._config.deterministic:
                self._close(self._decoder.close_chunks())
            self._exchange(control=False)
            self._plane.call_all(self._counts)  # of rollouts that those answers ended
            if self._writing:
                self._release(*(one.owned for one in self._writing.values()))
        except (Stopping, RunGone, RedisUnavailable) as error:
            log.warning("rollouts not released, another worker will claim them: %s", error)
        finally:
            for rid in self._decoder.busy:
                self._decoder.remove(rid)
            self._writing.clear()
            self._alone.clear()
        metrics.slots_busy.labels("rollout").set(0)

    def _report_alive(self) -> None:
        metrics.turned("rollout")
        metrics.busy_ratio.labels("rollout").set(self._busy.share)
        self._plane.seen(
            self._worker,
            role="rollout",
            slots=self._decoder.slots,
            writing=len(self._writing),
            tokens=self._decoder.decoded_tokens,
            busy=f"{self._busy.share:.3f}",
            version=self.version,
        )

    def _is_due(self, what: str, every_s: float) -> bool:
        now = self._clock()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every_s
        return True


def _join(chunks: list[bytes | None]) -> Ints:
    """The tokens of stored chunks. Raises MessageError when one is missing."""
    parts = []
    for seq, data in enumerate(chunks):
        if data is None:
            raise MessageError(f"chunk {seq} is missing")
        parts.append(ChunkTokens.decode(data).tokens)
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
