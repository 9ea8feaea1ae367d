"""A vLLM server behind the interface of the slots: one request a chunk.

A request asks for what is left of a chunk, so a rollout is never further ahead than it may be: to hold it is not to
ask. The server's answer says which weights wrote which tokens, so several workers may use one server and any of them
may swap its weights; an answer over a swap becomes two chunks. A stop aborts the open request, which is then answered
with its tokens, so that all that was written is counted.

A server that does not answer is nobody's fault: requests are asked again, from what is known of each rollout, until
`patience_s` is over.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.blame import EngineBroken
from actors.engine.adapters import Adapter, unpacked
from actors.engine.base_files import BaseFiles
from actors.engine.decode import NO_TOKENS, UNWATCHED_CHUNK, ClosedChunk, checked_text
from actors.engine.shared import Shared
from actors.vllm.answers import Answer, BadAnswer
from actors.vllm.chunks import Outcomes, chunks_of
from actors.vllm.client import Client, RequestRefused, ServerDown, ServerFailed, TokenRequest
from actors.vllm.facts import check_server
from actors.vllm.server import OwnServer
from actors.vllm.weights import (
    FolderUnread,
    Given,
    NotLoaded,
    OfModel,
    SwapLost,
    WeightsFile,
    WithAdapter,
    install,
    version_in,
)
from common import metrics
from common.config.sections import Vllm
from common.failing import brief
from common.pretrained import ModelError, ModelFacts

log = logging.getLogger("katana.vllm")
_WAIT_S = 0.01  # of a step, for answers
_LAST_ANSWERS_S = 5.0  # for the answers of aborted requests
_ABORT_AGAIN_S = 0.25  # an abort that overtook its request did nothing
_QUIET_S = 2.0  # without an answer, while some are due, before the server is asked whether it is there
_LONGEST_PAUSE_S = 2.0  # between two attempts to reach it
_MOST_FAILURES = 3  # of one rollout's requests, others being answered between
_ONE_TROUBLE_S = 10.0  # failures that are no further apart are one
_SERVER_ERRORS = (ServerDown, ServerFailed, RequestRefused, BadAnswer, SwapLost, FolderUnread, OSError)


@dataclass(slots=True, eq=False)
class _Text:
    """A rollout. tokens: prompt and completion; prompt: tokens of it; limit: of both, at most; watched: see `add`."""

    key: str
    tokens: list[int]
    prompt: int
    limit: int
    watched: int
    seed: int
    salt: str
    held: bool = False
    ended: bool = False
    open: _Open | None = None
    ready: list[ClosedChunk] = field(default_factory=list)  # written and not yet given to the worker
    error: Exception | None = None  # of its own
    failures: int = 0
    answers: int = 0  # of other requests, at its last failure
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class _Open:
    """A request that has no answer yet. start: tokens known when it was asked; most: tokens that it asks for."""

    text: _Text
    request_id: str
    start: int
    most: int
    future: Future[Answer] | None = None


class VllmWriter:
    """Writes with a server: one of `urls`, or one that it starts by `command` and that ends with this process.

    student: its facts. slots: rollouts at a time, at most the server's `--max-num-seqs`. max_length: tokens of prompt
    and completion together. chunk_tokens: length of a full chunk. temperature, top_p: how the server samples; what it
    lists is at temperature 1. base: what adapters are merged into; None: there are none.
    """

    def __init__(
        self,
        settings: Vllm,
        student: ModelFacts,
        *,
        section: str = "rollout.vllm",
        outcomes: Outcomes,
        slots: int,
        max_length: int,
        chunk_tokens: int,
        temperature: float = 1.0,
        base: BaseFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._settings, self._student, self._outcomes = settings, student, outcomes
        self._section = section
        self._slots, self._max_length, self._chunk_tokens = slots, max_length, chunk_tokens
        self._temperature, self._clock = temperature, clock
        self._own = OwnServer(tuple(settings.command), student.folder) if settings.command else None
        self._client: Client | None = None
        self._shared: Shared | None = None
        self._wanted: tuple[int, Given] | None = None
        self._texts: dict[str, _Text] = {}
        self._answered: queue.SimpleQueue[_Open] = queue.SimpleQueue()
        self.decoded_tokens = 0
        self._answers = 0
        self._heard_at = self._down_at = self._trouble_at = self._failed_at = 0.0
        self._down = self._was_ready = False
        self._reads = False  # the server is known to read the run's folder
        self._next_try = 0.0
        self._why = ""  # it was last not reached
        self._first = ""  # reason for which it is down
        self._pause_s = 0.0
        self._health: Future[object] | None = None
        self._closers = [weakref.finalize(self, self._own.end)] if self._own is not None else []

    # --- the server --------------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Rollouts at a time; after `attach` no more than the server writes."""
        return self._slots

    @property
    def free(self) -> int:
        """Rollouts that `add` takes now: none while the server is down. Without any, nobody calls `step`, so it is here
        that the server is asked whether it is back."""
        ready = self._up() if self._down and not self._texts else not self._down
        return max(0, self._slots - len(self._texts)) if ready else 0

    @property
    def busy(self) -> tuple[str, ...]:
        """Keys of the rollouts here, in the order of admission."""
        return tuple(self._texts)

    def attach(self, shared: Shared) -> bool:
        """Reach the server, starting its own first, and check that it can write this run: see `Writer.attach`."""
        self._shared, self._wanted = shared, None
        self._choose(shared)
        self._start_own()
        until = self._clock() + self._settings.start_timeout_s
        while (most := self._checked()) is None:
            if self._clock() > until or (self._own is not None and not self._own.runs):
                self._give_up_start()
            if shared.pause(0.25):
                return False
        self._slots = min(self._slots, most)
        self._now_up()
        return True

    def end(self) -> None:
        """End a server of its own, and all connections; done at the latest when the process ends."""
        for close in self._closers:
            close()

    def _choose(self, shared: Shared) -> None:
        """The server of this task: of several, workers that begin one after the other have one after the other."""
        urls = self._settings.urls if self._own is None else [self._own.url]
        url = urls[shared.number() % len(urls)] if len(urls) > 1 else urls[0]
        if self._client is not None and self._client.url != url:
            self._closers.pop()()
            self._client = None
        if self._client is None:
            self._client = Client(url, request_timeout_s=self._settings.request_timeout_s)
            self._closers.append(weakref.finalize(self, self._client.close))
            self._reads, self._health = False, None
            log.info("the vLLM server of this task is %s", url)

    def _checked(self) -> int | None:
        """How many rollouts the server writes at a time; None if it does not answer yet. Raises ModelError."""
        assert self._client is not None
        if not self._there():
            return None
        try:
            return check_server(self._client, self._student, self._outcomes, self._max_length, section=self._section)
        except ServerDown as error:
            self._why = str(error)
            return None

    def _start_own(self) -> None:
        """Start a server of its own, if that does not run."""
        if self._own is not None and not self._own.runs:
            if self._was_ready:
                log.warning("%s", self._own.last_words())
            self._own.start()
            self._was_ready = False

    def _there(self) -> bool:
        assert self._client is not None
        try:
            self._client.get("/health", timeout_s=_QUIET_S)
        except (ServerDown, ServerFailed, RequestRefused, BadAnswer) as error:
            self._why = str(error)
            return False
        self._was_ready = True
        return True

    def _give_up_start(self) -> None:
        assert self._client is not None
        waited = f"no usable answer in {self._settings.start_timeout_s:g} s ({self._why})"
        if self._own is None:
            raise ModelError(
                f"{self._section}.urls: {waited}; start it with `vllm serve {self._student.folder} "
                f"--enable-scale-out …` (docs/vllm.md), or raise {self._section}.start_timeout_s"
            )
        raise ModelError(f"{self._section}.command: {self._own.last_words()}")

    def _failed(self, reason: str, *, down: bool) -> None:
        """Something did not work, and no rollout is at fault. Raises EngineBroken where that lasts too long."""
        now = self._clock()
        if now - self._failed_at > _ONE_TROUBLE_S and not self._down:
            self._trouble_at = now
        self._failed_at = now
        if down and not self._down:
            self._down, self._down_at, self._reads = True, now, False
            self._first = reason
            self._pause_s = 0.05
            log.warning("the vLLM server cannot be used, what it writes waits: %s", reason)
            metrics.vllm_up.set(0)
        if self._down:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._next_try = now + self._pause_s
        lasts_s = now - self._trouble_at
        if self._own is not None and self._was_ready and lasts_s > self._settings.patience_s:
            log.warning("the vLLM server is ended and started again: %s", reason)
            self._own.end()
        if lasts_s > self._patience_s:
            first = f"{self._first}; then " if self._down and self._first != reason else ""
            raise EngineBroken(f"the vLLM server cannot be used for {lasts_s:.0f} s: {first}{reason}")

    @property
    def _patience_s(self) -> float:
        # A server of one's own is started again, and has the time that it had at first.
        return self._settings.patience_s + (self._settings.start_timeout_s if self._own is not None else 0.0)

    def _now_up(self) -> None:
        if self._down:
            log.warning("the vLLM server answers again, after %.1f s", self._clock() - self._down_at)
        self._down = False
        self._heard_at = self._clock()
        self._health = None
        metrics.vllm_up.set(1)

    def _up(self) -> bool:
        """Whether requests can be made. A server that was down is asked whether it is back, and given its weights."""
        if not self._down:
            self._watch()
        if not self._down:
            return True
        if self._clock() < self._next_try:
            return False
        self._start_own()
        if not self._there():
            self._failed(self._why, down=True)
            return False
        try:
            self._install()
        except _SERVER_ERRORS as error:
            self._failed(brief(error), down=True)
            return False
        self._now_up()
        return True

    def _watch(self) -> None:
        """Notice a server that hangs: answers are due, and it does not say that it is well."""
        assert self._client is not None
        if self._health is not None and self._health.done():
            error = self._health.exception()
            self._health = None
            self._heard_at = self._clock()
            if error is not None:
                self._failed(str(error), down=True)
        elif self._health is None and self._clock() - self._heard_at > _QUIET_S and self._any_open():
            self._health = self._client.healthy(_QUIET_S)

    def _any_open(self) -> bool:
        return any(text.open is not None for text in self._texts.values())

    # --- weights -----------------------------------------------------------------------------------------------

    def read_weights(self, data: bytes) -> WeightsFile | WithAdapter:
        """A published file, for the server to read: as it is, or an adapter, to be merged into its base. Raises
        ValueError, SafetensorError."""
        content = unpacked(data)
        if not isinstance(content, Adapter):
            return WeightsFile.of(data)
        if self._base is None:
            raise ValueError("an adapter, but the config has no learner.lora")
        return WithAdapter.of(data, content, self._base)

    def swap(self, weights: Given, version: int = 0) -> None:
        """Give the server these weights, unless another worker has. A server that cannot take them now gets them before
        anything else is asked of it. Raises ModelError if it does not read the run's folder, or the model's."""
        self._wanted = (version, weights)
        if self._down:
            return
        try:
            self._install()
        except FolderUnread as error:
            raise ModelError(f"{self._section}: {error}") from error
        except _SERVER_ERRORS as error:
            if isinstance(error, NotLoaded) and isinstance(weights, OfModel):
                raise ModelError(f"{self._section}: {error}") from error
            self._failed(f"version {version} was not swapped in: {brief(error)}", down=True)

    def _install(self) -> None:
        if self._wanted is not None:
            assert self._client is not None and self._shared is not None
            version, weights = self._wanted
            install(self._client, self._shared, version, weights, reads=self._reads)
            self._reads = self._reads or not isinstance(weights, OfModel)

    # --- rollouts ----------------------------------------------------------------------------------------------

    def add(
        self,
        key: str,
        prompt: NDArray[np.int32],
        *,
        seed: int,
        max_new_tokens: int,
        generated: NDArray[np.int32] = NO_TOKENS,
        unwatched: int = 0,
    ) -> None:
        """Take a rollout: see `Writer.add`."""
        tokens, limit = checked_text(
            key, prompt, generated, max_new_tokens, length=self._max_length, vocab_size=self._outcomes.vocab_size
        )
        if key in self._texts:
            raise ValueError(f"{key} is being written already")
        if len(self._texts) >= self._slots:
            raise RuntimeError(f"{key}: no free slot")
        self._texts[key] = _Text(
            key,
            tokens.tolist(),
            len(prompt),
            limit,
            watched=len(prompt) + unwatched,
            seed=seed,
            salt=self._salt(),
        )

    def _salt(self) -> str:
        """Rollouts that are begun with the same weights share what the server has cached of a prompt; none reads what
        older weights have cached."""
        version = self._wanted[0] if self._wanted else -1
        return f"{self._shared.run if self._shared else ''}:{version}"

    def remove(self, key: str) -> int:
        """Drop a rollout; its open request is ended, and what that has written counts."""
        text = self._texts[key]
        try:
            if text.open is not None:
                self._end_requests([text.open])
        finally:
            del self._texts[key]
        return len(text.tokens) - text.prompt

    def discard(self, key: str) -> int:
        """Like `remove`: a server keeps nothing that could fail again."""
        return self.remove(key)

    def hold(self, key: str) -> None:
        """Begin no other chunk of a rollout. Raises KeyError."""
        self._texts[key].held = True

    def release(self, key: str) -> None:
        """Let a held rollout go on. Raises KeyError."""
        self._texts[key].held = False

    def step(self, only: Sequence[str] | None = None) -> list[ClosedChunk]:
        """Ask for chunks that are due, and return those that have come, waiting for at most some milliseconds. Raises
        the error of a rollout's own if it is the only one, EngineBroken."""
        texts = [self._texts[key] for key in (self._texts if only is None else only)]
        if self._up():
            now = self._clock()
            for text in texts:
                if self._is_due(text, now):
                    self._ask(text)
        self._collect(0.0 if any(self._returns(text) for text in texts) else _WAIT_S)
        errors = [text for text in texts if text.error is not None]
        if errors:
            self._raise(errors, alone=len(texts) == 1)
        return [self._next_chunk(text) for text in texts if self._returns(text)]

    def _raise(self, errors: list[_Text], *, alone: bool) -> None:
        error = errors[0].error
        assert error is not None
        if alone:
            errors[0].error = None
        raise error

    @staticmethod
    def _returns(text: _Text) -> bool:
        return bool(text.ready) and not text.held

    def _next_chunk(self, text: _Text) -> ClosedChunk:
        chunk = text.ready.pop(0)
        if chunk.finish is not None:
            del self._texts[text.key]
        return chunk

    def _is_due(self, text: _Text, now: float) -> bool:
        waits = text.held or text.ended or text.open is not None or text.error is not None
        return not waits and not text.ready and now >= text.not_before

    def _ask(self, text: _Text) -> None:
        assert self._client is not None
        known = len(text.tokens)
        # Where the last chunk was cut short, by a swap or an end of a worker, the next is whole again, as in slots.
        length = self._chunk_tokens
        if known < text.watched:
            length = min(max(length, UNWATCHED_CHUNK), max(length, text.watched - known))
        asked = _Open(text, f"{text.key}-{known}-{secrets.token_hex(6)}", known, most=min(length, text.limit - known))
        request = TokenRequest(
            asked.request_id,
            tuple(text.tokens),
            asked.most,
            _seed_at(text.seed, known - text.prompt),
            self._outcomes.asked,
            self._outcomes.stop_ids,
            self._temperature,
            self._outcomes.top_p,
            text.salt,
        )
        if not self._any_open():
            self._heard_at = self._clock()
        text.open = asked
        asked.future = self._client.generate(request, lambda _: self._answered.put(asked))

    def _collect(self, wait_s: float) -> None:
        """Take what has been answered; wait for the first answer if there is none."""
        if not self._any_open():
            time.sleep(wait_s)
            return
        while True:
            try:
                asked = self._answered.get(timeout=wait_s) if wait_s else self._answered.get_nowait()
            except queue.Empty:
                return
            self._take(asked)
            wait_s = 0.0

    def _take(self, asked: _Open) -> None:
        text = asked.text
        if text.open is not asked:
            return  # given up before
        text.open = None
        assert asked.future is not None
        try:
            answer = asked.future.result(0)
            self._heard_at = self._clock()
            self._absorb(asked, answer)
        except (ServerDown, CancelledError) as error:
            self._failed(brief(error) if isinstance(error, CancelledError) else str(error), down=True)
        except ServerFailed as error:
            self._fault(text, error)
        except (RequestRefused, BadAnswer) as error:
            text.error = error

    def _absorb(self, asked: _Open, answer: Answer) -> None:
        """Add an answer's tokens to its rollout. Raises BadAnswer."""
        assert self._shared is not None
        text, run = asked.text, self._shared.run
        found = chunks_of(
            answer,
            self._outcomes,
            key=text.key,
            start=asked.start - text.prompt,
            asked=asked.most,
            last=asked.start + asked.most == text.limit,
            version_of=lambda label: version_in(label, run),
        )
        self._answers += 1
        text.failures = 0
        for chunk in found.chunks:
            text.tokens += chunk.tokens.tolist()
            text.ready.append(chunk)
            text.ended = chunk.finish is not None
            self.decoded_tokens += len(chunk.tokens)
        if found.refused:
            metrics.vllm_tokens_refused.inc(found.refused)
            self._failed(f"it wrote with {answer.spans[-1].label!r:.80}, which is no version of this run", down=True)
        elif not found.chunks:
            self._failed("it ended a request before its first token", down=False)
            text.not_before = self._clock() + 0.1

    def _fault(self, text: _Text, error: ServerFailed) -> None:
        """A request failed: a few times, while others are answered, and the rollout is at fault."""
        if self._answers > text.answers:
            text.failures += 1
        text.answers = self._answers
        if text.failures >= _MOST_FAILURES:
            text.error = error
            return
        text.not_before = self._clock() + 0.1 * 2**text.failures
        self._failed(str(error), down=False)

    def close_chunks(self) -> list[ClosedChunk]:
        """End all open requests, and return all that was written."""
        asked = [text.open for text in self._texts.values() if text.open is not None]
        if asked:
            self._end_requests(asked)
        closed = []
        for text in list(self._texts.values()):
            while text.ready:
                closed.append(self._next_chunk(text))
        return closed

    def _end_requests(self, asked: list[_Open]) -> None:
        """Have them answered with what they have. Where the server does not do that soon, they are given up: what they
        have written is lost, and not counted."""
        until = self._clock() + (0.0 if self._down else _LAST_ANSWERS_S)
        again_at = 0.0
        while (left := [one for one in asked if one.text.open is one]) and self._clock() < until and not self._down:
            if self._clock() >= again_at:
                self._abort(left)
                again_at = self._clock() + _ABORT_AGAIN_S
            self._collect(_WAIT_S)
        self._collect(0.0)
        for one in asked:
            if one.text.open is one:
                one.text.open = None
                assert one.future is not None
                one.future.cancel()
                if not self._down:
                    self._failed("it does not end a request that was aborted", down=True)

    def _abort(self, asked: list[_Open]) -> None:
        assert self._client is not None
        try:
            self._client.abort([one.request_id for one in asked])
        except (ServerDown, ServerFailed, RequestRefused, BadAnswer) as error:
            self._failed(str(error), down=True)

    # --- faults ------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Have the server write a token. Raises what it answers; a server that is down is waited for elsewhere."""
        if self._down or self._client is None:
            return
        token = next(one for one in range(self._outcomes.vocab_size) if one not in self._outcomes.stop_ids)
        request = TokenRequest(
            f"proof-{secrets.token_hex(6)}",
            (token,),
            1,
            0,
            self._outcomes.asked,
            self._outcomes.stop_ids,
            self._temperature,
            self._outcomes.top_p,
            self._salt(),
        )
        try:
            self._client.generate(request, lambda _: None).result(self._settings.request_timeout_s)
        except (ServerDown, TimeoutError) as error:
            self._failed(str(error), down=True)

    def economize(self) -> int:
        """The server's memory is its own: 0."""
        return 0


def _seed_at(seed: int, start: int) -> int:
    """A request's seed, of 63 bits: a rollout that is resumed elsewhere goes on with the same draws."""
    text = f"{seed % 2**64}:{start}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
