"""Engines that replay recorded rollouts: what a rollout and a teacher worker ask of a model, at no model's cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.engine import ClosedChunk, Scored, ScoreRequest
from actors.engine.adapters import unpacked
from common import tracing
from common.rids import number_of
from common.wire.messages import Ints
from ops.bench.recorded import RecordedRollout

_LONGEST_PAUSE_S = 0.002  # of a step without a chunk: about as long as one of a small model


class ReplayedPrompts:
    """The feeder's source: problem n has the prompt of the recorded rollout n, and no answer is judged."""

    def __init__(self, recorded: Sequence[RecordedRollout]) -> None:
        self._recorded = recorded

    def prompt(self, problem: int) -> Ints:
        return self._recorded[problem % len(self._recorded)].prompt

    def teacher(self, problem: int) -> str:
        return ""

    def judge(self, problem: int, tokens: Ints) -> bool | None:
        return None


class ReplayedDecoder:
    """Closes the next recorded chunk of its rollouts: at each step of all that are ready, or `rate` chunks a second.

    A rate is offered whatever the rest does: chunks that are due while every rollout is held are closed later, all at
    once. Each chunk is noted in the trace as `closed`.
    """

    def __init__(self, recorded: Sequence[RecordedRollout], slots: int, rate: float | None) -> None:
        self._recorded, self.slots, self._rate = recorded, slots, rate
        self._next: dict[str, int] = {}  # chunk of each rollout in a slot, those that have waited longest first
        self._held: set[str] = set()
        self._began, self._closed = time.monotonic(), 0
        self.decoded_tokens = 0

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(self._next)

    @property
    def free(self) -> int:
        return self.slots - len(self._next)

    def add(
        self, key: str, prompt: Ints, *, seed: int, max_new_tokens: int, generated: Ints, unwatched: int = 0
    ) -> None:
        """`generated`: whole chunks."""
        self._next[key] = [one.chunk.start for one in self._of(key).chunks].index(len(generated))

    def remove(self, key: str) -> int:
        place = self._next.pop(key)
        self._held.discard(key)
        return sum(len(one.chunk.tokens) for one in self._of(key).chunks[:place])

    discard = remove

    def hold(self, key: str) -> None:
        self._held.add(key)

    def release(self, key: str) -> None:
        self._held.discard(key)

    def step(self, only: Sequence[str] | None = None) -> list[ClosedChunk]:
        ready = [key for key in self._next if key not in self._held and (only is None or key in set(only))]
        closed = [self._close(key) for key in ready[: self._due(len(ready))]]
        self._closed += len(closed)
        if not closed:
            time.sleep(_LONGEST_PAUSE_S)
        return closed

    def close_chunks(self) -> list[ClosedChunk]:
        return []

    def read_weights(self, data: bytes) -> Any:
        return unpacked(data)

    def attach(self, shared: Any) -> bool:
        return True

    def swap(self, state: Any, version: int = 0) -> None:
        pass

    def prove(self) -> None:
        pass

    def _due(self, ready: int) -> int:
        if self._rate is None:
            return ready
        return max(0, int((time.monotonic() - self._began) * self._rate) - self._closed)

    def _close(self, key: str) -> ClosedChunk:
        place = self._next.pop(key)
        chunk = self._of(key).chunks[place].chunk
        self.decoded_tokens += len(chunk.tokens)
        if chunk.finish is None:
            self._next[key] = place + 1  # at the end: the others are due before it
        tracing.stage(key, "closed", seq=place, tokens=chunk.start + len(chunk.tokens))
        return ClosedChunk(
            key,
            chunk.start,
            chunk.tokens,
            chunk.support_ids,
            chunk.support_logprobs,
            chunk.tail_logprobs,
            chunk.rollout_logprobs,
            chunk.sampled_logprobs,
            chunk.finish,
        )

    def _of(self, key: str) -> RecordedRollout:
        return self._recorded[number_of(key) % len(self._recorded)]


class ReplayedScorer:
    """Gives the recorded scores."""

    def __init__(self, recorded: Sequence[RecordedRollout], slots: int) -> None:
        self._recorded, self.slots = recorded, slots
        self._ends: dict[str, int] = {}
        self.rebuilt_tokens = 0

    @property
    def held(self) -> int:
        return len(self._ends)

    def cached(self, key: str) -> int:
        return self._ends.get(key, -1)

    def drop(self, key: str) -> None:
        self._ends.pop(key, None)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Raises KeyError for a chunk that is not in the recording."""
        return [self._score(request) for request in requests]

    score_in_turn = score

    def economize(self) -> int:
        return 0

    def discard(self, keys: set[str]) -> None:
        for key in keys:
            self.drop(key)

    def prove(self) -> None:
        pass

    def _score(self, request: ScoreRequest) -> Scored:
        chunks = self._recorded[number_of(request.key) % len(self._recorded)].chunks
        for one in chunks:
            if one.chunk.start == request.start and np.array_equal(one.chunk.tokens, request.tokens):
                self._ends[request.key] = request.start + len(request.tokens)
                return one.scored
        raise KeyError(request.key)
