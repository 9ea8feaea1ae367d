"""The rollout worker: writes admitted rollouts, hands over their chunks, stops when told.

Generation goes on while earlier chunks are scored, up to `max_unscored_chunks`. Whatever Redis answers to a chunk
other than "ok" means: free the slot. Output of a former owner, of a stopped rollout or of a run that is over is
refused there and does no harm.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from actors.busy import BusyShare
from actors.engine import ClosedChunk, Decoder
from common import metrics
from common.config import Config
from common.messages import (
    ChunkSupport,
    ChunkTokens,
    Ints,
    MessageError,
    RolloutHead,
    read_number,
    read_rid,
    support_digest,
)
from common.streams import Plane, RedisUnavailable, RunGone, Stopping, Taken
from common.weights import BadWeights, read_pointer, verified

log = logging.getLogger("katana.rollout")
_CONTROL_S = 0.01  # how often signals and credit are looked at
_IDLE_S = 0.02  # how often an idle worker looks for rollouts
_POINTER_S = 0.1  # how often the policy pointer is read
_MAX_CLAIMS = 10  # a rollout taken from so many silent workers without progress is given up


@dataclass(slots=True)
class _Writing:
    """A rollout in a slot. `sent` and `scored` count chunks."""

    rid: str
    entry: bytes
    nonce: str
    sent: int
    scored: int
    held: bool = False


class RolloutWorker:
    """One shift of one worker."""

    def __init__(self, config: Config, plane: Plane, decoder: Decoder, *, worker: str, stop: threading.Event) -> None:
        self._config, self._plane, self._decoder, self._worker, self._stop = config, plane, decoder, worker, stop
        self._folder = config.run_dir / "weights"
        self._writing: dict[str, _Writing] = {}
        self._refused: list[tuple[ClosedChunk, int]] = []  # chunks that a full Redis has not taken, with their version
        self._version = self._step = -1
        self._signal = self._claim_from = b"0-0"
        self._busy = BusyShare()
        self._due: dict[str, float] = {}
        metrics.slots_total.labels("rollout").set(config.rollout.slots)

    def serve(self, until: float) -> None:
        """Write until `until` (monotonic seconds), the end of the run, or a stop; then hand everything back."""
        try:
            if self._wait_for_weights():
                while not self._stop.is_set() and time.monotonic() < until:
                    if not self.step():
                        return
        except Stopping:
            log.info("stopped while waiting for Redis")
        finally:
            self._drain()

    def step(self) -> bool:
        """One turn: heartbeat, signals, weights, refill, one engine step. False once the run is over."""
        metrics.turned("rollout")
        if self._is_due("beat", self._config.liveness.heartbeat_s):
            self._say_alive()
            self._beat(list(self._writing.values()))
        if self._is_due("control", _CONTROL_S):
            self._take_signals()
            self._beat([writing for writing in self._writing.values() if writing.held])
        # Deterministic: only what a rollout calls for (`_start`), so that no chunk is ever closed before it is full.
        if not self._config.deterministic and self._is_due("pointer", _POINTER_S):
            self._follow_policy()
        if not self._refill():
            return False
        if self._refused and self._is_due("refused", 0.25):
            again, self._refused = self._refused, []
            for chunk, version in again:
                self._send([chunk], version)
        if not any(not writing.held for writing in self._writing.values()):
            self._stop.wait(_CONTROL_S)
            return True
        with self._busy.work(), metrics.engine_step_seconds.labels("rollout").time():
            before = self._decoder.decoded_tokens
            closed = self._decoder.step()
        metrics.decode_tokens.labels("rollout").inc(self._decoder.decoded_tokens - before)
        self._send(closed)
        return True

    # --- what comes in -----------------------------------------------------------------------------------------

    def _refill(self) -> bool:
        """Take rollouts for the free slots. False once the run is over."""
        free = self._config.rollout.slots - len(self._writing)
        if free == 0 or not self._is_due("refill", _IDLE_S):
            return True
        claim = self._plane.may_claim and self._is_due("claim", self._config.liveness.heartbeat_s)
        nonce = secrets.token_hex(8)
        idle_ms = int(self._config.liveness.claim_s * 1000) if claim else 0
        reply = self._plane.call("take", self._worker, nonce, free, idle_ms, self._claim_from)
        if reply[0] == b"ended":
            return False
        self._claim_from = reply[1]
        for rid, entry, chunks, length, claims in reply[2:]:
            known, most = "", self._config.max_length  # a chunk has at least a token
            try:
                known = read_rid(rid)
                if claims is None:
                    raise MessageError("rollout.claims: not a number")
                stored = read_number(chunks, "rollout.chunks", high=most)
                taken = Taken(known, entry, stored, read_number(length, "rollout.length", high=most), int(claims))
            except MessageError as error:
                if known:
                    self._plane.call("release", self._worker, known, entry, nonce)
                self._give_up(known, str(error), entry)
                continue
            self._start(taken, nonce)
        metrics.slots_busy.labels("rollout").set(len(self._writing))
        return True

    def _start(self, taken: Taken, nonce: str) -> None:
        if taken.claims:
            metrics.claims.labels("prompts").inc()
            log.info("rollout %s taken over at token %d", taken.rid, taken.length)
        if taken.claims > _MAX_CLAIMS:
            reason = f"taken over {taken.claims} times without progress"
            self._give_up(taken.rid, reason, taken.entry, attempts=1)
            return
        names = ["head", "scored", *(f"t:{seq}" for seq in range(taken.chunks))]
        head_bytes, scored, *chunks = self._plane.fields([(taken.rid, names)])[0]
        if head_bytes is None:
            return  # ended between the two calls
        # A rollout that this very worker had lost from sight (a claim after a stall) is written from the record.
        if taken.rid in self._writing:
            self._forget(taken.rid)
        try:
            head = RolloutHead.decode(head_bytes)
            done = read_number(scored or b"0", "rollout.scored")
            writing = _Writing(taken.rid, taken.entry, nonce, taken.chunks, done)
            if not self._has_weights_of(head.step):
                self._plane.call("release", self._worker, taken.rid, taken.entry, nonce)
                return
            self._decoder.add(
                taken.rid,
                head.prompt,
                seed=head.seed,
                max_new_tokens=head.max_new_tokens,
                generated=_join(chunks),
            )
        except (MessageError, ValueError) as error:
            self._plane.call("release", self._worker, taken.rid, taken.entry, nonce)
            self._give_up(taken.rid, str(error), taken.entry)
            return
        self._writing[taken.rid] = writing
        self._hold_or_release(writing)

    def _give_up(self, rid: str, reason: str, entry: bytes, attempts: int | None = None) -> None:
        log.warning("rollout %s cannot be written: %s", rid or "?", reason)
        attempts = attempts or (self._config.liveness.max_attempts if rid else 1)
        if self._plane.fail(rid, "rollout", reason, max_attempts=attempts, at=("prompts", "rollout", entry)):
            metrics.dead_letters.labels("rollout").inc()

    def _take_signals(self) -> None:
        if not self._writing:
            return
        name = self._plane.key(f"signals:{self._worker}")
        client = self._plane.client
        answer = self._plane.patiently(lambda: client.xread({name: self._signal}, count=256), "signals")
        for _, entries in answer or []:
            self._signal = entries[-1][0]
            read = [entry for entry, _ in entries]
            self._plane.patiently(partial(client.xdel, name, *read), "signals")
            for _, values in entries:
                rid = values.get(b"rid", b"").decode("ascii", "replace")
                if rid in self._writing:
                    self._end(rid)

    def _beat(self, writing: list[_Writing]) -> None:
        """Say that these are being written; learn what was scored, ended, or taken away."""
        if not writing:
            return
        args = [part for one in writing for part in (one.rid, one.entry, one.nonce)]
        reply = self._plane.call("beat", self._worker, *args)
        for one, word in zip(writing, reply[1:], strict=True):
            if word == b"ended":
                self._end(one.rid)
            elif word == b"lost":
                self._forget(one.rid)
            else:
                self._learn_scored(one, word)

    def _learn_scored(self, writing: _Writing, scored: bytes | None) -> None:
        try:
            writing.scored = read_number(scored or b"0", "rollout.scored")
        except MessageError as error:
            self._forget(writing.rid)
            self._plane.call("release", self._worker, writing.rid, writing.entry, writing.nonce)
            self._give_up(writing.rid, str(error), writing.entry)
            return
        self._hold_or_release(writing)

    def _hold_or_release(self, writing: _Writing) -> None:
        refused = any(chunk.key == writing.rid for chunk, _ in self._refused)
        hold = refused or writing.sent - writing.scored >= self._config.rollout.max_unscored_chunks
        if hold != writing.held:
            writing.held = hold
            (self._decoder.hold if hold else self._decoder.release)(writing.rid)

    def _end(self, rid: str, final: ClosedChunk | None = None) -> None:
        """The rollout has its verdict: free the slot and report how much was written, the chunk at hand included."""
        writing = self._writing[rid]
        generated = self._forget(rid) or (final.start + len(final.tokens) if final else 0)
        self._plane.call("count", rid, writing.nonce, generated)

    def _forget(self, rid: str) -> int:
        del self._writing[rid]
        refused = [chunk for chunk, _ in self._refused if chunk.key == rid]
        self._refused = [pair for pair in self._refused if pair[0].key != rid]
        if rid in self._decoder.busy:
            return self._decoder.remove(rid)
        # A final chunk that a full Redis refused has left its slot.
        return refused[-1].start + len(refused[-1].tokens) if refused else 0

    # --- what goes out -----------------------------------------------------------------------------------------

    def _send(self, closed: list[ClosedChunk], version: int | None = None) -> None:
        """Store chunks, at most one of a rollout, in one round trip; `version` wrote them (None: the current one)."""
        version = self._version if version is None else version
        pairs = [(self._writing[chunk.key], chunk) for chunk in closed if chunk.key in self._writing]
        calls = [self._arguments(writing, chunk, version) for writing, chunk in pairs]
        for (writing, chunk), reply in zip(pairs, self._plane.call_each("chunk", calls), strict=True):
            self._take_reply(writing, chunk, version, reply)

    def _arguments(self, writing: _Writing, chunk: ClosedChunk, version: int) -> tuple[str | int | bytes, ...]:
        support = ChunkSupport(
            support_ids=chunk.support_ids,
            support_logprobs=chunk.support_logprobs,
            tail_logprobs=chunk.tail_logprobs,
            rollout_logprobs=chunk.rollout_logprobs,
            sampled_logprobs=chunk.sampled_logprobs,
        ).encode()
        tokens = ChunkTokens(
            seq=writing.sent,
            start=chunk.start,
            policy_version=version,
            finish=chunk.finish,
            writer=writing.nonce,
            digest=support_digest(support),
            tokens=chunk.tokens,
        ).encode()
        length = chunk.start + len(chunk.tokens)
        shard = self._plane.shard_of(writing.rid)
        return writing.rid, writing.nonce, writing.sent, tokens, support, shard, length, chunk.finish or ""

    def _take_reply(self, writing: _Writing, chunk: ClosedChunk, version: int, reply: list[Any]) -> None:
        word = reply[0]
        if word == b"ok":
            metrics.chunks_sent.inc()
            writing.sent += 1
            if chunk.finish:
                del self._writing[writing.rid]
            else:
                self._learn_scored(writing, reply[1])
        elif word == b"full":
            log.warning("Redis is full: a chunk of %s waits", writing.rid)
            self._refused.append((chunk, version))
            if chunk.finish:  # it has left its slot already
                writing.held = True
            else:
                self._hold_or_release(writing)
        else:
            metrics.chunks_fenced.inc()
            if word == b"ended":
                self._end(writing.rid, chunk)
            else:
                self._forget(writing.rid)

    # --- weights -----------------------------------------------------------------------------------------------

    def _wait_for_weights(self) -> bool:
        """Load the newest weights before the first claim. False if the run ends or we are stopped first."""
        while not self._stop.is_set():
            if self._follow_policy():
                return True
            if self._plane.state() != "open":
                return False
            self._stop.wait(0.1)
        return False

    def _has_weights_of(self, step: int | None) -> bool:
        """Swap if a rollout must be written by other weights. Whatever is in a slot then is of an earlier step: it has
        its verdict, and nobody takes its chunks any more."""
        if step is not None and step != self._step:
            self._follow_policy(step)
        return step in (None, self._step)

    def _follow_policy(self, step: int | None = None) -> bool:
        """Swap in the announced weights (with `step`: if they are that step's), every open chunk closed first.

        True if some version is loaded.
        """
        pointer = self._plane.policy()
        try:
            announced = read_pointer(pointer)
            if announced is None or announced[0].version <= self._version or step not in (None, announced[1]):
                return self._version >= 0
            ref, of_step = announced
            path = verified(self._folder, ref)
            state = load_file(path, device=self._config.rollout.device)
        except (BadWeights, OSError, SafetensorError) as error:
            metrics.dead_letters.labels("weights").inc()
            log.warning("weights refused, going on with version %d: %s", self._version, error)
            self._due["pointer"] = time.monotonic() + 20 * _POINTER_S  # they are large, and will be no better
            return self._version >= 0
        self._send(self._decoder.close_chunks())
        self._decoder.swap(state)
        self._version, self._step = ref.version, of_step
        metrics.policy_version.labels("rollout").set(ref.version)
        return True

    # --- the end -----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Close open chunks, hand rollouts back, leave the list of the living: in this order, so that what is
        handed back is complete and nobody waits for us."""
        try:
            # Deterministic: no chunk ends but where it would have; what is open is written again, bit for bit.
            if not self._config.deterministic:
                self._send(self._decoder.close_chunks())
            args = [part for one in self._writing.values() for part in (one.rid, one.entry, one.nonce)]
            if args:
                self._plane.call("release", self._worker, *args)
        except (Stopping, RunGone, RedisUnavailable) as error:
            log.warning("not handed back, another worker will claim after a while: %s", error)
        finally:
            for rid in self._decoder.busy:
                self._decoder.remove(rid)
            self._writing.clear()
        metrics.slots_busy.labels("rollout").set(0)
        self._plane.gone(self._worker)

    def _say_alive(self) -> None:
        metrics.busy_ratio.labels("rollout").set(self._busy.share)
        self._plane.seen(
            self._worker,
            role="rollout",
            slots=self._config.rollout.slots,
            writing=len(self._writing),
            tokens=self._decoder.decoded_tokens,
            busy=f"{self._busy.share:.3f}",
            version=self._version,
        )

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
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
