"""The teacher worker: scores chunks in the order of arrival, and keeps the KV caches of rollouts while it can.

Which worker of a teacher serves which shard affects only speed: any of them can score any chunk, by rebuilding the
cache from the rollout's hash, and the first stored score wins. Several teachers have streams of their own, and a worker
reads and takes over those of its teacher only.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass

import numpy as np

from actors.blame import ALONE_AFTER, Blame
from actors.busy import BusyShare, Idling
from actors.engine import Scored, Scorer, ScoreRequest
from actors.engine.outcomes import support_size
from actors.pace import Pace
from common import metrics, tracing
from common.config import Config
from common.divergence import coarse_entropy, coarse_reverse_kl
from common.failing import brief, out_of_memory
from common.pulse import Pulse
from common.teachers import called, in_lane
from common.wire import scripts
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    Ints,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    read_logprobs,
    read_number,
    read_rid,
    read_support,
    support_digest,
)
from common.wire.plane import Plane, Roster, Stopping, shown
from common.wire.record import divergence_field, logprobs_field, support_field, tokens_field
from common.wire.scripts import Entry, ScoreAnswer

log = logging.getLogger("katana.teacher")
_HELP_AFTER_S = 0.3  # a teacher that is idle for so long takes work of others
_SHORTEST_IDLE_S, _LONGEST_IDLE_S = 0.05, 2.0  # between two polls of an idle teacher


@dataclass(frozen=True, slots=True)
class _Work:
    """One notice of `chunks:{lane}`."""

    lane: str
    entry: bytes
    rid: str
    seq: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    work: _Work
    head: RolloutHead
    tokens: ChunkTokens
    support: ChunkSupport
    logprobs: ChunkLogprobs
    record: bytes  # the tokens as they are stored
    before: bytes | None  # those of the previous chunk


class TeacherWorker:
    """A teacher worker during one worker task."""

    def __init__(
        self,
        config: Config,
        plane: Plane,
        scorer: Scorer,
        *,
        vocab_size: int,
        stop_count: int,
        worker: str,
        stop: threading.Event,
        teacher: str = "",
    ) -> None:
        """`teacher`: whose of several it is, by name."""
        self._config, self._plane, self._scorer, self._teacher = config, plane, scorer, teacher
        self._vocab_size, self._worker, self._stop = vocab_size, worker, stop
        self._support = support_size(config.termination.teacher_top_k, vocab_size, stop_count)
        self._whole = vocab_size - stop_count <= self._support  # the support holds every outcome
        self._busy = BusyShare()
        self._idle = Idling(_SHORTEST_IDLE_S, min(_LONGEST_IDLE_S, config.liveness.heartbeat_s))
        live = config.liveness
        self._roster = Roster(silence_s=3 * live.heartbeat_s + 1)
        self._pulse = Pulse(self._report_alive, every_s=live.heartbeat_s, turn_s=live.claim_s, busy_s=live.busy_s)
        self._mine = list(range(plane.shards))  # this teacher's shards by revision `_mine_of` of the roster
        self._mine_of = self._roster.revision
        self._claim_at = 0.0
        self._turn_of = 0  # the shard of another teacher whose idle notices are claimed next
        self._waiting: list[_Work] = []
        self._pace = Pace(config.rollout.max_unscored_chunks)
        self._alone: set[str] = set()  # rollouts that are scored alone, after all others
        self._blame = Blame(scorer.prove, deed="scored", model="teacher")
        # By rollout, the record of the last scored chunk. It has the digest of its support, which depends on all text
        # before it: if the stored record differs, the cache holds another text, perhaps of another run.
        self._latest: dict[str, bytes] = {}
        self._scored_tokens = 0
        self._late = (
            False  # the first of `_waiting` is a chunk whose earlier tokens are being forwarded, a piece a step
        )
        metrics.slots_total.labels("teacher").set(scorer.slots)

    def serve(self, until: float) -> None:
        """Score until `until` (monotonic seconds), the end of the run, or a stop."""
        try:
            with self._pulse:
                while not self._stop.is_set() and time.monotonic() < until:
                    if not self.step() and self._plane.state() in (None, "ended"):
                        return
        except Stopping:
            log.info("stopped while waiting for Redis")
        finally:
            streams = self._plane.chunk_streams(self._teacher)
            self._plane.gone(self._worker, role="teacher", streams=streams, teacher=self._teacher)

    def step(self, block_s: float | None = None) -> bool:
        """Read notices and score their chunks. True if there were any. `block_s`: how long to wait for notices; None:
        the longer the teacher has been idle, the longer."""
        self._pulse.turn()
        block_s = self._idle.pause_s if block_s is None else block_s
        if time.monotonic() >= self._claim_at:
            self._claim_at = time.monotonic() + self._config.liveness.heartbeat_s
            self._claim()
        count = 1 if self._config.deterministic else self._scorer.slots
        if not self._waiting:
            self._note(self._wait_for_own(count, block_s))
        if not self._waiting and len(self._mine) < self._plane.shards and self._idle.idle_s > _HELP_AFTER_S:
            # Helping costs forwards: the cache of the earlier chunks is rebuilt here, and again by the next teacher.
            self._note(self._read(range(self._plane.shards), count, 0.0))
        if self._waiting and not self._config.deterministic:
            self._fill(count)
        work, self._waiting, self._late = self._waiting[:count], self._waiting[count:], False
        if not work:
            return False
        self._idle.worked()
        with self._pulse.busy("scoring"), self._busy.work():
            self._score(work)
        return True

    def _fill(self, count: int) -> None:
        """Wait for a fuller batch, as long as that holds no rollout up; not while a long text is forwarded."""
        patience_s = 0.0 if self._late else self._pace.patience_s(len(self._waiting))
        if patience_s or self._late:
            self._stop.wait(patience_s)
            if self._mine:
                self._note(self._read(self._mine, count, 0.0))

    # --- notices -----------------------------------------------------------------------------------------------

    def _wait_for_own(self, count: int, block_s: float) -> list[tuple[str, Entry]]:
        """Notices of this teacher's shards; a teacher without shards waits equally long."""
        if self._mine_of != self._roster.revision:  # the pulse's thread updates it
            self._mine_of, teachers = self._roster.revision, sorted(self._roster.names) or [self._worker]
            self._mine = [shard for shard in range(self._plane.shards) if rendezvous(shard, teachers) == self._worker]
        if self._mine:
            return self._read(self._mine, count, block_s)
        self._stop.wait(block_s)
        return []

    def _read(self, shards: range | list[int], count: int, block_s: float) -> list[tuple[str, Entry]]:
        streams = self._plane.chunk_streams(self._teacher, shards)
        # COUNT applies to each stream separately.
        each = max(1, count // max(1, min(len(streams), 8)))
        return self._plane.read("teacher", self._worker, streams, count=each, block_s=block_s) if streams else []

    def _note(self, entries: list[tuple[str, Entry]]) -> None:
        before = len(self._waiting)
        for stream, (entry, values) in entries:
            try:
                rid = read_rid(values.get(b"rid"))
                seq = read_number(values.get(b"seq"), "chunks.seq", high=1 << 31)
            except MessageError as error:
                at = (stream, "teacher", entry)
                self._plane.fail("", "chunks", str(error), max_attempts=1, shown=shown(values), at=at)
                continue
            self._waiting.append(_Work(in_lane(stream)[0], entry, rid, seq))
        self._pace.saw(((work.rid, work.seq) for work in self._waiting[before:]), time.monotonic())

    def _claim(self) -> None:
        # A teacher claims in its own shards and, in turn, in the others': their teacher may be busy for long.
        self._turn_of = (self._turn_of + 1) % self._plane.shards
        streams = self._plane.chunk_streams(self._teacher, sorted({*self._mine, self._turn_of}))
        idle_s = self._config.liveness.claim_s
        claimed = self._plane.claim_chunks(self._worker, idle_s=idle_s, count=32, streams=streams)
        known = {(f"chunks:{work.lane}", work.entry) for work in self._waiting}
        for stream, entry, takeovers in claimed:
            metrics.claims.labels("chunks").inc()
            if takeovers >= ALONE_AFTER:
                self._alone.add(entry[1][b"rid"].decode("ascii", "replace"))
            if (stream, entry[0]) not in known:
                self._note([(stream, entry)])

    def _report_alive(self) -> None:
        metrics.turned("teacher")
        metrics.busy_ratio.labels("teacher").set(self._busy.share)
        self._plane.seen(
            self._worker,
            role="teacher",
            roster=self._roster,
            teacher=self._teacher,
            tokens=self._scored_tokens,
            busy=f"{self._busy.share:.3f}",
        )

    # --- scoring -----------------------------------------------------------------------------------------------

    def _score(self, work: list[_Work]) -> None:
        loaded = self._load(self._next(work))
        if not loaded:
            return
        if self._config.deterministic:
            self._scorer.forget()  # score each chunk alone, from its prompt on: the same tensor shapes in every run
        before = self._scorer.rebuilt_tokens
        self._score_or_part(loaded)
        metrics.rebuilt_tokens.inc(self._scorer.rebuilt_tokens - before)
        metrics.slots_total.labels("teacher").set(self._scorer.slots)
        metrics.slots_busy.labels("teacher").set(self._scorer.held)

    def _next(self, work: list[_Work]) -> list[_Work]:
        """What to score now. A rollout that may crash this process waits until no other does, so that the others do not
        fail with it. It is given up after `max_attempts` such attempts."""
        good = [one for one in work if one.rid not in self._alone]
        if good or not work:
            self._waiting += [one for one in work if one.rid in self._alone]
            return good
        rid = work[0].rid
        self._waiting += [one for one in work if one.rid != rid]
        begun, most = self._plane.attempt(rid, "teacher"), self._config.liveness.max_attempts
        if begun <= most:
            return [one for one in work if one.rid == rid]
        self._give_up(work[0], f"{begun - 1} teachers ended while scoring only this rollout", attempts=1)
        return []

    def _score_or_part(self, loaded: list[_Loaded]) -> None:
        """Score and store. If a batch fails, each half is tried, down to the single rollout that fails."""
        loaded, requests = self._requests(loaded)
        if not requests:
            return
        scored, error = self._answers(requests)
        if error is None:
            self._store(loaded, scored)
        elif out_of_memory(error) and not self._config.deterministic and (tokens := self._scorer.economize()):
            # No rollout is at fault. A deterministic run must not change its batches, so there it counts as a failure.
            log.warning("out of memory: at most %d tokens in a forward from now on (%s)", tokens, brief(error))
            self._score_or_part(loaded)
        elif len(rids := sorted({one.work.rid for one in loaded})) > 1:
            first = set(rids[: len(rids) // 2])
            self._score_or_part([one for one in loaded if one.work.rid in first])
            self._score_or_part([one for one in loaded if one.work.rid not in first])
        else:
            self._count_failure(loaded, error)

    def _answers(self, requests: list[ScoreRequest]) -> tuple[list[Scored | None], Exception | None]:
        """The scores (None: not yet, see `_wait_in_front`), or the error that the model raised; the cache then holds
        nothing of these requests."""
        # One that is scored alone has one attempt a step, so it is scored in one.
        whole = self._config.deterministic or any(one.key in self._alone for one in requests)
        score = self._scorer.score if whole else self._scorer.score_in_turn
        try:
            forward = tracing.span("a forward", chunks=len(requests), tokens=sum(len(one.tokens) for one in requests))
            with forward, metrics.chunk_score_seconds.time(), metrics.engine_step_seconds.labels("teacher").time():
                scored: list[Scored | None] = [*score(requests)]
        except Exception as error:
            failed = error.with_traceback(None)  # its frames keep tensors in memory
        else:
            metrics.decode_tokens.labels("teacher").inc(sum(len(one.sampled) for one in scored if one))
            return scored, None
        self._scorer.discard({request.key for request in requests})
        return [], failed

    def _count_failure(self, loaded: list[_Loaded], error: Exception) -> None:
        """Count a failure of a single rollout. Raises EngineBroken if this process is at fault."""
        work = loaded[0].work
        if work.rid in self._alone:
            self._plane.attempt_over(work.rid, "teacher")
        self._blame.of(work.rid, error)
        self._alone.add(work.rid)
        self._waiting += [one.work for one in loaded[1:]]
        self._give_up(work, brief(error))

    def _load(self, work: list[_Work]) -> list[_Loaded]:
        """Read the chunks of the notices, in the order of seq, each once; acknowledge notices without work."""
        work = sorted({(one.rid, one.seq): one for one in reversed(work)}.values(), key=lambda one: (one.rid, one.seq))
        answers = self._plane.fields((one.rid, _wanted(one.seq)) for one in work)
        loaded, over = [], []
        for one, (head, verdict, done, tokens, support, logprobs, before) in zip(work, answers, strict=True):
            if head is None or verdict is not None or done is not None or tokens is None:
                over.append(scripts.score(one.lane, one.entry, one.rid, one.seq, b"", b""))
                if verdict is not None or head is None:
                    self._drop(one.rid)
                continue
            try:
                record = RolloutHead.decode(head)
                if record.scored_by != self._teacher:  # no work of ours: its own teacher has a notice of it
                    reason = f"a chunk of {called(record.scored_by)} in the stream of {called(self._teacher)}"
                    at = (f"chunks:{one.lane}", "teacher", one.entry)
                    self._plane.fail("", "chunks", reason, max_attempts=1, at=at)
                    continue
                loaded.append(self._decode(one, record, tokens, support or b"", logprobs or b"", before))
            except MessageError as error:
                self._give_up(one, str(error))
        self._plane.call_all(over)  # nothing left to score: the script only acknowledges the notices
        return loaded

    def _decode(
        self, work: _Work, head: RolloutHead, tokens: bytes, support: bytes, logprobs: bytes, before: bytes | None
    ) -> _Loaded:
        parts = head, ChunkTokens.decode(tokens)
        student = read_support(support), read_logprobs(logprobs, support)
        one = _Loaded(work, *parts, *student, tokens, before)
        if one.tokens.seq != work.seq or support_digest(support, logprobs) != one.tokens.digest:
            raise MessageError("the chunk's support does not have the digest in its tokens")
        n, k = len(one.tokens.tokens), self._support
        if one.support.support_ids.shape != (n, k) or one.logprobs.support_logprobs.shape != (n, k + 1):
            raise MessageError(f"the chunk's support is not [tokens, {k}]")
        if (one.logprobs.tail_logprobs is None) != self._whole:
            raise MessageError("the chunk has a tail although its support holds every outcome, or lacks the tail")
        highest = max(one.tokens.tokens.max(), one.support.support_ids.max(initial=0), one.head.prompt.max())
        if highest >= self._vocab_size:
            raise MessageError(f"token id {highest} is outside the vocabulary of {self._vocab_size}")
        if len(one.head.prompt) + one.tokens.start + len(one.tokens.tokens) > self._config.max_length:
            raise MessageError(f"the rollout is longer than {self._config.max_length} tokens")
        return one

    def _requests(self, loaded: list[_Loaded]) -> tuple[list[_Loaded], list[ScoreRequest]]:
        """The requests, and their chunks; a chunk whose earlier chunks cannot be read is given up."""
        good, requests = [], []
        reached: dict[str, int] = {}
        broken: set[str] = set()
        for one in loaded:
            start, rid = one.tokens.start, one.work.rid
            if rid in broken:  # one attempt per rollout and iteration
                self._waiting.append(one.work)
                continue
            if start and rid not in reached and (one.before is None or self._latest.get(rid) != one.before):
                self._scorer.drop(rid)
            at_hand = reached.get(rid, self._scorer.cached(rid))
            try:
                prefix = None if at_hand == start or start == 0 else self._prefix(one)
            except MessageError as error:
                broken.add(rid)
                self._give_up(one.work, f"an earlier chunk: {error}")
                continue
            good.append(one)
            requests.append(
                ScoreRequest(
                    key=rid,
                    prompt=one.head.prompt,
                    start=start,
                    tokens=one.tokens.tokens,
                    support_ids=one.support.support_ids,
                    prefix=prefix,
                )
            )
            reached[rid] = start + len(one.tokens.tokens)
        return good, requests

    def _prefix(self, one: _Loaded) -> Ints:
        """The completion before a chunk, from the record. Raises MessageError."""
        seqs, start = range(one.work.seq), one.tokens.start
        if len(seqs) > start:  # a chunk has at least a token
            raise MessageError(f"{start} tokens cannot be {len(seqs)} chunks")
        names = ["head", "verdict", *map(tokens_field, seqs)]
        head, verdict, *stored = self._plane.fields([(one.work.rid, names)])[0]
        if head is None or verdict is not None:  # ended meanwhile: any prefix of this length will do
            return np.zeros(start, np.int32)  # the score will be refused
        prefix: Ints = np.zeros(0, np.int32)
        for seq, data in zip(seqs, stored, strict=True):
            if data is None:
                raise MessageError(f"chunk {seq} is missing")
            chunk = ChunkTokens.decode(data)
            if (chunk.seq, chunk.start) != (seq, len(prefix)):
                raise MessageError(f"chunk {chunk.seq} from token {chunk.start} is stored as chunk {seq}")
            prefix = np.concatenate((prefix, chunk.tokens))
        if len(prefix) != start:
            raise MessageError(f"{len(prefix)} tokens are stored before token {start}")
        if prefix.max(initial=0) >= self._vocab_size:
            raise MessageError(f"token id {prefix.max()} is outside the vocabulary of {self._vocab_size}")
        return prefix

    def _wait_in_front(self, late: list[_Loaded]) -> None:
        """Chunks to score when all that is before them is forwarded: in front, so that no other takes their slot."""
        first = {one.work.rid: one for one in reversed(late)}
        # What is forwarded of their text goes with the record that it was read from.
        self._latest |= {rid: one.before for rid, one in first.items() if one.before is not None}
        self._waiting[:0] = [one.work for one in late]
        self._late |= bool(late)

    def _store(self, loaded: list[_Loaded], scored: list[Scored | None]) -> None:
        """Store the scores in one round trip; give up chunks whose scores are not finite."""
        self._wait_in_front([one for one, answer in zip(loaded, scored, strict=True) if answer is None])
        good, calls = [], []
        for one, answer in zip(loaded, scored, strict=True):
            work = one.work
            if answer is None:
                continue
            try:
                records = _records(one, answer, with_view=self._config.stores_view)
            except ValueError as error:
                self._give_up(work, str(error))
                continue
            good.append(one)
            calls.append(scripts.score(work.lane, work.entry, work.rid, work.seq, *records))
        for one, reply in zip(good, self._plane.call_all(calls), strict=True):
            self._scored_tokens += len(one.tokens.tokens)
            if reply is ScoreAnswer.OK:
                metrics.chunks_scored.inc()
                tracing.stage(one.work.rid, "scored", seq=one.work.seq)
            elif reply is ScoreAnswer.DUPLICATE:
                metrics.chunks_duplicate.inc()
            self._blame.succeeded()
            self._alone.discard(one.work.rid)
            self._latest[one.work.rid] = one.record
            if reply is ScoreAnswer.ENDED or one.tokens.finish:
                self._drop(one.work.rid)
        if len(self._latest) > 4 * self._scorer.slots:  # some are evicted or have ended
            self._latest = {rid: record for rid, record in self._latest.items() if self._scorer.cached(rid) >= 0}

    def _drop(self, rid: str) -> None:
        """Forget a rollout that has ended."""
        self._scorer.drop(rid)
        self._alone.discard(rid)
        self._latest.pop(rid, None)
        self._pace.over(rid)

    def _give_up(self, work: _Work, reason: str, attempts: int | None = None) -> None:
        """Count an attempt; `attempts`: how many are allowed, by default `liveness.max_attempts`."""
        log.warning("chunk %d of rollout %s cannot be scored: %s", work.seq, work.rid, reason)
        at = (f"chunks:{work.lane}", "teacher", work.entry)
        most = attempts or self._config.liveness.max_attempts
        if self._plane.fail(work.rid, "teacher", reason, max_attempts=most, at=at):
            self._drop(work.rid)
        else:
            self._waiting.append(work)


def _wanted(seq: int) -> list[str]:
    """The fields that a notice needs: of its chunk, and the tokens of the previous chunk."""
    of_chunk = (divergence_field, tokens_field, support_field, logprobs_field)
    return ["head", "verdict", *(field(seq) for field in of_chunk), tokens_field(seq - 1)]


def _records(one: _Loaded, scored: Scored, *, with_view: bool) -> tuple[bytes, bytes, bytes]:
    """Divergence, log-probabilities and view of a chunk, encoded; no view: b"". Raises ValueError if they are not
    finite."""
    divergence = coarse_reverse_kl(
        one.logprobs.support_logprobs, scored.teacher_logprobs, one.logprobs.tail_logprobs, scored.tail_logprobs
    )
    # The divergence, on which verdicts depend, is on the student's support; the record is for the loss.
    own = scored.own
    support = ScoreSupport(
        teacher_logprobs=scored.teacher_logprobs,
        tail_logprobs=own.tail_logprobs if own else scored.tail_logprobs,
        sampled_logprobs=scored.sampled,
        own_ids=own.ids if own else None,
        own_logprobs=own.logprobs if own else None,
    )
    view = b""
    if with_view:
        entropy = coarse_entropy(one.logprobs.support_logprobs, one.logprobs.tail_logprobs)
        rows = np.stack((entropy, one.support.rollout_logprobs, scored.sampled))
        view = ScoreView(seq=one.work.seq, view=rows).encode()
    return ScoreDivergence(seq=one.work.seq, divergence=divergence).encode(), support.encode(), view


def rendezvous(shard: int, teachers: list[str]) -> str:
    """The teacher with the highest hash serves the shard: if one joins or leaves, only its shards move."""
    return max(teachers, key=lambda name: hashlib.blake2b(f"{name}:{shard}".encode(), digest_size=8).digest())
