"""The teacher worker: scores chunks in the order they come, keeps rollouts' caches while it can.

Who serves which shard decides speed only: any teacher may score any chunk, rebuilding the cache from the rollout's
hash, and the first score stored wins.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass

import numpy as np

from actors.busy import BusyShare
from actors.engine import Scored, Scorer, ScoreRequest
from actors.outcomes import support_size
from common import metrics
from common.config import Config
from common.divergence import coarse_reverse_kl
from common.messages import (
    ChunkSupport,
    ChunkTokens,
    Ints,
    MessageError,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    read_number,
    read_rid,
    support_digest,
)
from common.streams import Entry, Plane, Stopping, shown

log = logging.getLogger("katana.teacher")


@dataclass(frozen=True, slots=True)
class _Work:
    """One notice of `chunks:{shard}`."""

    shard: int
    entry: bytes
    rid: str
    seq: int


@dataclass(frozen=True, slots=True)
class _Loaded:
    work: _Work
    head: RolloutHead
    tokens: ChunkTokens
    support: ChunkSupport


class TeacherWorker:
    """One shift of one worker."""

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
    ) -> None:
        self._config, self._plane, self._scorer = config, plane, scorer
        self._vocab_size, self._worker, self._stop = vocab_size, worker, stop
        self._support = support_size(config.termination.teacher_top_k, vocab_size, stop_count)
        self._whole = vocab_size - stop_count <= self._support  # the support holds every outcome
        self._busy = BusyShare()
        self._mine = list(range(plane.shards))
        self._alive_at = 0.0
        self._waiting: list[_Work] = []
        self._scored_tokens = 0
        metrics.slots_total.labels("teacher").set(config.teacher.slots)

    def serve(self, until: float) -> None:
        """Score until `until` (monotonic seconds), the end of the run, or a stop."""
        try:
            while not self._stop.is_set() and time.monotonic() < until:
                if not self.step() and self._plane.state() in (None, "ended"):
                    return
        except Stopping:
            log.info("stopped while waiting for Redis")
        finally:
            self._plane.gone(self._worker)

    def step(self, block_s: float = 0.05) -> bool:
        """Read notices and score what they point at. True if there were any."""
        metrics.turned("teacher")
        if time.monotonic() >= self._alive_at:
            self._alive_at = time.monotonic() + self._config.liveness.heartbeat_s
            self._say_alive()
            self._claim()
        count = 1 if self._config.deterministic else max(1, self._config.teacher.slots)
        if not self._waiting:
            self._note(self._read(self._mine, count, block_s))
        if not self._waiting:
            # Idle: help with others' shards.
            self._note(self._read(range(self._plane.shards), count, 0.0))
        work, self._waiting = self._waiting[:count], self._waiting[count:]
        if not work:
            return False
        with self._busy.work():
            self._score(work)
        return True

    # --- notices -----------------------------------------------------------------------------------------------

    def _read(self, shards: range | list[int], count: int, block_s: float) -> list[tuple[str, Entry]]:
        streams = [f"chunks:{shard}" for shard in shards]
        # COUNT holds for each stream by itself.
        each = max(1, count // max(1, min(len(streams), 8)))
        return self._plane.read("teacher", self._worker, streams, count=each, block_s=block_s) if streams else []

    def _note(self, entries: list[tuple[str, Entry]]) -> None:
        for stream, (entry, values) in entries:
            shard = int(stream.partition(":")[2])
            try:
                rid = read_rid(values.get(b"rid"))
                seq = read_number(values.get(b"seq"), "chunks.seq", high=1 << 31)
            except MessageError as error:
                self._plane.fail(
                    "", "chunks", str(error), max_attempts=1, shown=shown(values), at=(stream, "teacher", entry)
                )
                metrics.dead_letters.labels("chunks").inc()
                continue
            self._waiting.append(_Work(shard, entry, rid, seq))

    def _claim(self) -> None:
        streams = [f"chunks:{shard}" for shard in range(self._plane.shards)]
        idle_s = self._config.liveness.claim_s
        claimed = self._plane.claim_idle(streams, "teacher", self._worker, idle_s=idle_s, count=32)
        known = {(f"chunks:{work.shard}", work.entry) for work in self._waiting}
        for stream, found in claimed.items():
            metrics.claims.labels("chunks").inc(len(found))
            self._note([(stream, one) for one in found if (stream, one[0]) not in known])

    def _say_alive(self) -> None:
        metrics.busy_ratio.labels("teacher").set(self._busy.share)
        self._plane.seen(self._worker, role="teacher", tokens=self._scored_tokens, busy=f"{self._busy.share:.3f}")
        live = self._plane.live(within_s=3 * self._config.liveness.heartbeat_s + 1)
        teachers = sorted(name for name, facts in live.items() if facts.get("role") == "teacher") or [self._worker]
        self._mine = [shard for shard in range(self._plane.shards) if rendezvous(shard, teachers) == self._worker]

    # --- scoring -----------------------------------------------------------------------------------------------

    def _score(self, work: list[_Work]) -> None:
        loaded = self._load(work)
        if not loaded:
            return
        if self._config.deterministic:
            self._scorer.forget()  # a chunk by itself, from its prompt on: the same shapes whoever scores it, and when
        loaded, requests = self._requests(loaded)
        if not requests:
            return
        with metrics.chunk_score_seconds.time(), metrics.engine_step_seconds.labels("teacher").time():
            scored = self._scorer.score(requests)
        metrics.slots_busy.labels("teacher").set(self._scorer.held)
        metrics.decode_tokens.labels("teacher").inc(sum(len(one.sampled) for one in scored))
        self._store(loaded, scored)

    def _load(self, work: list[_Work]) -> list[_Loaded]:
        """Read what the notices point at, in the order of seq, each chunk once; notices without work are taken off."""
        work = sorted({(one.rid, one.seq): one for one in reversed(work)}.values(), key=lambda one: (one.rid, one.seq))
        answers = self._plane.fields(
            (one.rid, ["head", "verdict", f"d:{one.seq}", f"t:{one.seq}", f"p:{one.seq}"]) for one in work
        )
        loaded, over = [], []
        for one, (head, verdict, done, tokens, support) in zip(work, answers, strict=True):
            if head is None or verdict is not None or done is not None or tokens is None:
                over.append((one.shard, one.entry, one.rid, one.seq, b"", b""))
                if verdict is not None or head is None:
                    self._scorer.drop(one.rid)
                continue
            try:
                loaded.append(self._decode(one, head, tokens, support or b""))
            except MessageError as error:
                self._give_up(one, str(error))
        self._plane.call_each("score", over)  # nothing to score any more: the script only takes the notices off
        return loaded

    def _decode(self, work: _Work, head: bytes, tokens: bytes, support: bytes) -> _Loaded:
        one = _Loaded(work, RolloutHead.decode(head), ChunkTokens.decode(tokens), ChunkSupport.decode(support))
        if one.tokens.seq != work.seq or support_digest(support) != one.tokens.digest:
            raise MessageError("the chunk's support is not the one that its tokens name")
        if one.support.support_ids.shape != (len(one.tokens.tokens), self._support):
            raise MessageError(f"the chunk's support is not [tokens, {self._support}]")
        if (one.support.tail_logprobs is None) != self._whole:
            raise MessageError("the chunk has a tail where there is none, or none where there is one")
        highest = max(one.tokens.tokens.max(), one.support.support_ids.max(initial=0), one.head.prompt.max())
        if highest >= self._vocab_size:
            raise MessageError(f"token id {highest} is outside the vocabulary of {self._vocab_size}")
        if len(one.head.prompt) + one.tokens.start + len(one.tokens.tokens) > self._config.max_length:
            raise MessageError(f"the rollout is longer than {self._config.max_length} tokens")
        return one

    def _requests(self, loaded: list[_Loaded]) -> tuple[list[_Loaded], list[ScoreRequest]]:
        """What to ask, and for which chunks: those whose earlier chunks cannot be read are given up."""
        good, requests = [], []
        reached: dict[str, int] = {}
        broken: set[str] = set()
        for one in loaded:
            start, rid = one.tokens.start, one.work.rid
            if rid in broken:  # one attempt of a rollout a turn
                self._waiting.append(one.work)
                continue
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
        """The completion before a chunk, off the record. Raises MessageError."""
        seqs, start = range(one.work.seq), one.tokens.start
        if len(seqs) > start:  # a chunk has at least a token
            raise MessageError(f"{start} tokens cannot be {len(seqs)} chunks")
        names = ["head", "verdict", *(f"t:{seq}" for seq in seqs)]
        head, verdict, *stored = self._plane.fields([(one.work.rid, names)])[0]
        if head is None or verdict is not None:  # over meanwhile: anything of the right length serves
            return np.zeros(start, np.int32)  # its score is refused
        prefix: Ints = np.zeros(0, np.int32)
        for seq, data in zip(seqs, stored, strict=True):
            if data is None:
                raise MessageError(f"chunk {seq} is missing")
            chunk = ChunkTokens.decode(data)
            if (chunk.seq, chunk.start) != (seq, len(prefix)):
                raise MessageError(f"chunk {chunk.seq} from token {chunk.start} stands as chunk {seq}")
            prefix = np.concatenate((prefix, chunk.tokens))
        if len(prefix) != start:
            raise MessageError(f"{len(prefix)} tokens are stored before token {start}")
        if prefix.max(initial=0) >= self._vocab_size:
            raise MessageError(f"token id {prefix.max()} is outside the vocabulary of {self._vocab_size}")
        return prefix

    def _store(self, loaded: list[_Loaded], scored: list[Scored]) -> None:
        """Store what can be stored in one round trip; give up what cannot."""
        good, calls = [], []
        for one, answer in zip(loaded, scored, strict=True):
            work = one.work
            try:
                divergence, support = _records(one, answer)
            except ValueError as error:
                self._give_up(work, str(error))
                continue
            good.append(one)
            calls.append((work.shard, work.entry, work.rid, work.seq, divergence, support))
        for one, reply in zip(good, self._plane.call_each("score", calls), strict=True):
            self._scored_tokens += len(one.tokens.tokens)
            if reply[0] == b"ok":
                metrics.chunks_scored.inc()
            elif reply[0] == b"duplicate":
                metrics.chunks_duplicate.inc()
            if reply[0] == b"ended" or one.tokens.finish:
                self._scorer.drop(one.work.rid)

    def _give_up(self, work: _Work, reason: str) -> None:
        log.warning("chunk %d of rollout %s cannot be scored: %s", work.seq, work.rid, reason)
        at = (f"chunks:{work.shard}", "teacher", work.entry)
        if self._plane.fail(work.rid, "teacher", reason, max_attempts=self._config.liveness.max_attempts, at=at):
            metrics.dead_letters.labels("teacher").inc()
        else:
            self._waiting.append(work)


def _records(one: _Loaded, scored: Scored) -> tuple[bytes, bytes]:
    """Divergence and log-probabilities of a chunk, encoded. Raises ValueError where they are not finite."""
    divergence = coarse_reverse_kl(
        one.support.support_logprobs, scored.teacher_logprobs, one.support.tail_logprobs, scored.tail_logprobs
    )
    support = ScoreSupport(
        teacher_logprobs=scored.teacher_logprobs,
        tail_logprobs=scored.tail_logprobs,
        sampled_logprobs=scored.sampled,
    )
    return ScoreDivergence(seq=one.work.seq, divergence=divergence).encode(), support.encode()


def rendezvous(shard: int, teachers: list[str]) -> str:
    """The teacher with the highest hash serves the shard: when one comes or goes, only its shards move."""
    return max(teachers, key=lambda name: hashlib.blake2b(f"{name}:{shard}".encode(), digest_size=8).digest())
