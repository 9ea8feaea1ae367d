"""The teacher's side: chunks are scored in the order they were written, a slot per rollout.

A rollout's slot holds the text up to its last scored token, and all of it but that token is in the cache: the
logits after that token are what the next chunk's first token is scored with, so it is forwarded with the
next chunk. Where the cache does not hold a rollout at the chunk's start, it is rebuilt from the prompt and
the tokens before the chunk; what the slot already has in common with them is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.outcomes import PIECE_ROWS, beside_support, log_outcomes, on_support
from actors.engine.scored import OwnSupport, Scored, ScoreRequest
from actors.engine.slots import IntArray, padded, rectangles
from actors.engine.texts import TextSlots


@dataclass(slots=True)
class _Run:
    """Consecutive chunks of one rollout, scored as one text."""

    requests: list[tuple[int, ScoreRequest]]  # with the place of the answer
    warm: bool  # whether the cache holds the rollout exactly where the first chunk starts
    text: IntArray  # prompt and completion up to the end of the last chunk
    begin: int  # place in the text of the first token to score
    slot: int = -1
    support: IntArray = field(init=False)  # [n, K]
    outcomes: IntArray = field(init=False)  # [n], with every stop id as STOP
    scores: NDArray[np.float32] = field(init=False)  # [n, K+3]: sampled, tail, support; [n, K+3+K'+1]: own, its tail
    own_ids: IntArray = field(init=False)  # [n, K']

    @property
    def key(self) -> str:
        return self.requests[0][1].key

    @property
    def support_size(self) -> int:
        """K."""
        return int(self.requests[0][1].support_ids.shape[1])

    @property
    def end(self) -> int:
        last = self.requests[-1][1]
        return last.start + len(last.tokens)

    def prepare(self, stop_ids: tuple[int, ...], own: int) -> None:
        """Fill what scoring reads and writes. own: K'."""
        self.support = np.concatenate([request.support_ids for _, request in self.requests]).astype(np.int64)
        tokens = self.text[self.begin :]
        self.outcomes = np.where(np.isin(tokens, stop_ids), stop_ids[0], tokens)
        self.scores = np.empty((len(tokens), self.support.shape[1] + 3 + (own + 1 if own else 0)), dtype=np.float32)
        self.own_ids = np.empty((len(tokens), own), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward: `tokens` int64 [b, T] for the slots `rows`, row i from starts[i] on and lengths[i]
    long."""

    runs: list[_Run]
    rows: IntArray
    tokens: IntArray
    starts: IntArray
    lengths: IntArray


class Scorer(TextSlots):
    """Scores chunks with a teacher that keeps up to `slots` rollouts in its cache.

    A rollout that comes back after it was evicted shows that there are too few slots: their number is doubled, up to
    `max_slots` and as far as memory allows.

    max_length: tokens of prompt and completion together. stop_ids: U. prefill_tokens: most tokens, padding
    included, that one forward takes. teacher_support: K', how many of the model's own likeliest outcomes to add to each
    support, fewer where there are not so many. Raises UnsupportedModelError, ValueError.
    """

    def __init__(
        self, model: PreTrainedModel, *, max_slots: int = 0, teacher_support: int = 0, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self._teacher_support = teacher_support
        # `_slot` is in the order of use, the least recent first.
        self._max_slots = max(self.slots, max_slots)
        self._evicted: dict[str, None] = {}  # the last ones; which come back are rebuilt
        self.rebuilt_tokens = 0
        """Tokens forwarded in front of a chunk that is not the first, since its slot did not hold them."""
        self._unused = list(range(self.slots))

    @property
    def slots(self) -> int:
        """How many there are now."""
        return len(self._known)

    @property
    def held(self) -> int:
        """Rollouts whose cache is kept."""
        return len(self._slot)

    def cached(self, key: str) -> int:
        """The chunk start that can be scored without a prefix, in tokens of the completion; -1 if not
        held."""
        slot = self._slot.get(key)
        return -1 if slot is None else int(self._known[slot] - self._prompt[slot])

    def drop(self, key: str) -> None:
        """Forget a rollout; does nothing if it is not held."""
        slot = self._slot.pop(key, None)
        if slot is not None:
            self._unused.append(slot)

    def forget(self) -> None:
        """Drop all rollouts, and what slots still hold of their texts: the next score is computed without a cache."""
        self._slot.clear()
        self._prompts.clear()
        self._unused = list(range(len(self._known)))
        self._cached[:] = 0

    def discard(self, keys: Iterable[str]) -> None:
        """Drop rollouts whose scoring failed half-way, with all that it left in the cache."""
        slots = [slot for key in keys if (slot := self._slot.pop(key, None)) is not None]
        self._cached[slots] = 0
        self._unused += slots
        if slots:
            self._model.clear(np.array(slots))

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Score chunks; answers come in the order asked.

        Consecutive chunks of one rollout may be asked in one call. Raises KeyError(key) where a prefix is
        needed and missing, ValueError where shapes or lengths are wrong; nothing has been scored or evicted
        then. Whatever else it raises (FloatingPointError where logits are not finite, what the model raises) calls for
        `discard` of all that were asked.
        """
        runs = self._runs(requests)
        answers: dict[int, Scored] = {}
        while runs:
            wave, runs = self._wave(runs)
            for run in wave:
                self._seat(run)
                run.prepare(self._stop_ids, min(self._teacher_support, self._outside(run.support_size)))
            wave.sort(key=lambda run: run.slot)  # slots that follow each other are read without a copy
            followers = self._followers(wave)
            self._prefill([run for run in wave if run.slot not in followers])
            for run in wave:
                if run.slot in followers:
                    self._share_prompt(run.slot, int(self._prompt[run.slot]))
            self._prefill(wave)
            for batch in self._batches(wave, np.array([len(run.text) - 1 for run in wave])):
                self._score(batch)
            for run in wave:
                answers.update(self._answers(run))
        return [answers[place] for place in range(len(requests))]

    def score_in_turn(self, requests: Sequence[ScoreRequest]) -> list[Scored | None]:
        """`score`, but of one rollout a piece is forwarded where its text before the chunk takes more than one forward;
        None for those that need more.

        So others need not wait for a long text. What got None is to be asked again in the next call, with its prefix,
        before other rollouts: then its slot is not given to them. Raises like `score`.
        """
        late = self._late(requests)
        ready = [one for one in requests if one.key not in late]
        answers = iter(self.score(ready) if ready else [])
        for request in late.values():
            if self._advance(request):
                break
        return [None if one.key in late else next(answers) for one in requests]

    def _late(self, requests: Sequence[ScoreRequest]) -> dict[str, ScoreRequest]:
        """The first chunk of each rollout that lacks more than a forward in front of it."""
        first: dict[str, ScoreRequest] = {}
        for request in requests:
            first.setdefault(request.key, request)
        return {key: one for key, one in first.items() if self._missing(one) > self._prefill_tokens}

    def _missing(self, request: ScoreRequest) -> int:
        """Tokens to forward in front of a chunk."""
        needed = len(request.prompt) + request.start - 1
        if needed <= self._prefill_tokens or self.cached(request.key) == request.start:
            return 0  # in one forward, whatever is held of them
        slot = self._slot.get(request.key)
        if slot is None or (request.start and request.prefix is None):
            return needed
        return needed - self._common(slot, self._begin(0, request, first=True).text[:needed])

    @torch.inference_mode()
    def _advance(self, request: ScoreRequest) -> bool:
        """Forward a piece of what is in front of a chunk. False if no forward was needed: another slot held it."""
        (run,) = self._runs([request])
        self._seat(run)
        self._slot[run.key] = self._slot.pop(run.key)  # used last, so not evicted by the next call
        slot, length = run.slot, len(request.prompt)
        if self._cached[slot] < length - 1:
            self._share_prompt(slot, length)
        begin = int(self._cached[slot])
        piece = min(run.begin - 1 - begin, self._prefill_tokens)
        if piece <= 0:
            return False
        tokens = self._text[slot, begin : begin + piece]
        self._model.forward(np.array([slot]), tokens[None], np.array([begin]), np.array([piece]), [])
        self._cached[slot] += piece
        self.rebuilt_tokens += piece if request.start else 0
        return True

    def _followers(self, wave: list[_Run]) -> set[int]:
        """Slots whose prompt another run of the wave computes: it is copied then. One that a slot already holds is
        copied here."""
        seats = {run.slot for run in wave}
        found = set()
        for run in wave:
            length = int(self._prompt[run.slot])
            if self._cached[run.slot] < length - 1:
                first = self._share_prompt(run.slot, length)
                if first != run.slot and first in seats and self._cached[run.slot] < length - 1:
                    found.add(run.slot)
        return found

    def _prefill(self, runs: list[_Run]) -> None:
        """Forward what stands before the runs' first tokens."""
        if runs:
            self.rebuilt_tokens += sum(
                run.begin - 1 - int(self._cached[run.slot]) for run in runs if run.requests[0][1].start
            )
            for batch in self._batches(runs, np.array([run.begin - 1 for run in runs])):
                self._model.forward(batch.rows, batch.tokens, batch.starts, batch.lengths, [])

    def _runs(self, requests: Sequence[ScoreRequest]) -> list[_Run]:
        """Join consecutive chunks, and refuse what cannot be scored before anything is done."""
        runs: list[_Run] = []
        latest: dict[str, _Run] = {}
        for place, request in enumerate(requests):
            self._check(request, requests[0].support_ids.shape[1])
            run = latest.get(request.key)
            if run is not None and run.end == request.start:
                run.requests.append((place, request))
                run.text = np.concatenate([run.text, request.tokens], dtype=np.int64)
            else:
                run = self._begin(place, request, first=run is None)
                latest[request.key] = run
                runs.append(run)
            if len(run.text) > self._text.shape[1]:
                raise ValueError(f"{request.key}: {len(run.text)} tokens exceed {self._text.shape[1]}")
        # Warm runs come first, in the slots they have: evicted by an earlier wave, they would cost a rebuild.
        return sorted(runs, key=lambda run: not run.warm)

    def _check(self, request: ScoreRequest, support: int) -> None:
        n = len(request.tokens)
        if n == 0 or len(request.prompt) == 0:
            raise ValueError(f"{request.key}: a chunk and its prompt have at least one token each")
        if request.support_ids.shape != (n, support):
            shape = request.support_ids.shape
            raise ValueError(f"{request.key}: support_ids {shape}, expected {(n, support)}")
        if request.prefix is not None and len(request.prefix) != request.start:
            given = len(request.prefix)
            raise ValueError(f"{request.key}: a prefix of {given} tokens, expected {request.start}")

    def _begin(self, place: int, request: ScoreRequest, *, first: bool) -> _Run:
        """A run that begins with this request; `first` of its key in this call."""
        begin = len(request.prompt) + request.start
        slot = self._slot.get(request.key)
        warm = (
            first
            and slot is not None
            and self.cached(request.key) == request.start
            and np.array_equal(self._text[slot, : self._prompt[slot]], request.prompt)
        )
        before: list[NDArray[Any]]
        if warm:
            before = [self._text[slot, :begin]]
        elif request.prefix is not None:
            before = [request.prompt, request.prefix]
        elif request.start == 0:
            before = [request.prompt]
        else:
            raise KeyError(request.key)
        text = np.concatenate([*before, request.tokens], dtype=np.int64)
        return _Run([(place, request)], warm, text, begin)

    def _wave(self, runs: list[_Run]) -> tuple[list[_Run], list[_Run]]:
        """The first runs of distinct rollouts, as many as there are slots; and the runs left, in order."""
        wave: dict[str, _Run] = {}
        left = []
        for run in runs:
            if run.key in wave or len(wave) == len(self._known):
                left.append(run)
            else:
                wave[run.key] = run
        for key in wave:  # used last, so not evicted by this wave
            if key in self._slot:
                self._slot[key] = self._slot.pop(key)
        return list(wave.values()), left

    def _seat(self, run: _Run) -> None:
        """Give a run its slot, with all of its text.

        What the slot has forwarded of the same text stays, even another rollout's, for example of the same prompt.
        """
        slot = self._slot.get(run.key)
        if slot is None:
            returns = run.key in self._evicted
            self._evicted.pop(run.key, None)
            if not self._unused and not (returns and self._grow()):
                self._evict()
            slot = self._slot[run.key] = self._unused.pop()
        self._cached[slot] = min(self._common(slot, run.text), run.begin - 1)
        self._text[slot, : len(run.text)] = run.text
        self._known[slot] = len(run.text)
        self._prompt[slot] = len(run.requests[0][1].prompt)
        run.slot = slot

    def _common(self, slot: int, text: IntArray) -> int:
        """How many tokens of this text the slot has forwarded."""
        shared = min(int(self._cached[slot]), len(text))
        differs = np.flatnonzero(self._text[slot, :shared] != text[:shared])
        return int(differs[0]) if len(differs) else shared

    def _grow(self) -> bool:
        """Twice as many slots. False where there may be no more."""
        old, new = self.slots, min(2 * self.slots, self._max_slots)
        if new == old or not self._model.grow(new):
            self._max_slots = old  # asked once: what was refused is not asked for at every chunk
            return False
        added = new - old
        self._text = np.concatenate([self._text, np.zeros((added, self._text.shape[1]), dtype=np.int64)])
        self._known, self._cached, self._prompt = (
            np.concatenate([counts, np.zeros(added, dtype=np.int64)])
            for counts in (self._known, self._cached, self._prompt)
        )
        self._unused += range(old, new)
        return True

    def _evict(self) -> None:
        """Free the slot that was used least recently: its rollout may be over."""
        key = next(iter(self._slot))
        self.drop(key)
        self._evicted[key] = None
        if len(self._evicted) > 4 * self._max_slots:
            del self._evicted[next(iter(self._evicted))]

    def _batches(self, runs: list[_Run], goals: IntArray) -> Iterator[_Batch]:
        """Forwards that bring each run's slot up to `goals` tokens; each counts once the next is asked for."""
        slots = np.array([run.slot for run in runs])
        while (left := goals - self._cached[slots]).any():
            waiting = np.flatnonzero(left)
            lengths = np.array(rectangles(left[waiting].tolist(), self._prefill_tokens))
            picked = waiting[: len(lengths)]
            rows = slots[picked]
            starts = self._cached[rows]
            tokens = [self._text[row, at : at + n] for row, at, n in zip(rows, starts, lengths, strict=True)]
            yield _Batch([runs[i] for i in picked], rows, padded(tokens), starts, lengths)
            self._cached[rows] += lengths

    def _score(self, batch: _Batch) -> None:
        """One forward of tokens whose successors are to be scored; the scores go to the runs."""
        states = self._model.states(batch.rows, batch.tokens, batch.starts, batch.lengths)
        states = torch.cat([row[:n] for row, n in zip(states, batch.lengths.tolist(), strict=True)])
        # The token at place p of the text is scored by the logits of place p - 1.
        spans = [
            (run, at + 1 - run.begin, at + 1 - run.begin + n)
            for run, at, n in zip(batch.runs, batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        ]
        drawn, support = (
            torch.from_numpy(np.concatenate(values)).to(states.device)
            for values in (
                [run.outcomes[first:last] for run, first, last in spans],
                [run.support[first:last] for run, first, last in spans],
            )
        )
        pieces = zip(*(torch.split(values, PIECE_ROWS) for values in (states, drawn, support)), strict=True)
        found = zip(*(self._scores(*piece) for piece in pieces), strict=True)
        scores, own_ids = (torch.cat(parts).cpu().numpy() for parts in found)
        ends = batch.lengths.cumsum()
        rows = zip(*(np.split(values, ends[:-1]) for values in (scores, own_ids)), strict=True)
        for (run, first, last), (of_run, ids_of_run) in zip(spans, rows, strict=True):
            run.scores[first:last], run.own_ids[first:last] = of_run, ids_of_run

    def _scores(self, states: Tensor, drawn: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [n, K+3]: sampled, tail (0 where absent), support; with own outcomes [n, K+3+K'+1]: these, their tail
        (0 where absent). And int64 [n, K'], their ids."""
        log_probs = log_outcomes(self._model.logits(states), self._stops, self._vocab_size)
        sampled = log_probs.gather(1, drawn[:, None])
        logprobs, tail = on_support(log_probs, support, self._stop_ids[0], stop_count=len(self._stop_ids))
        columns = [sampled, _or_zero(tail, sampled), logprobs]
        left = self._outside(support.shape[1])
        own = min(self._teacher_support, left)
        if not own:
            return torch.cat(columns, dim=1), support[:, :0]
        own_ids, own_logprobs, own_tail = beside_support(log_probs, own, left)
        return torch.cat([*columns, own_logprobs, _or_zero(own_tail, sampled)], dim=1), own_ids

    def _outside(self, support: int) -> int:
        """How many outcomes there are besides STOP and a support of this size."""
        return max(0, self._vocab_size - len(self._stop_ids) - support)

    def _answers(self, run: _Run) -> Iterator[tuple[int, Scored]]:
        """A run's scores, cut into its chunks."""
        if not np.isfinite(run.scores).all():
            raise FloatingPointError(f"{run.key}: the teacher's logits are not finite")
        left, size, own = self._outside(run.support_size), run.support_size + 3, run.own_ids.shape[1]
        first = 0
        for place, request in run.requests:
            of_chunk = slice(first, first + len(request.tokens))
            scores = run.scores[of_chunk]
            first = of_chunk.stop
            yield (
                place,
                Scored(
                    key=request.key,
                    start=request.start,
                    teacher_logprobs=scores[:, 2:size].copy(),
                    tail_logprobs=scores[:, 1].copy() if left else None,
                    sampled=scores[:, 0].copy(),
                    own=OwnSupport(
                        ids=run.own_ids[of_chunk].astype(np.int32),
                        logprobs=scores[:, size : size + own].copy(),
                        tail_logprobs=scores[:, -1].copy() if left > own else None,
                    )
                    if own
                    else None,
                ),
            )


def _or_zero(tail: Tensor | None, like: Tensor) -> Tensor:
    """A tail [n] as a column, of zeros where there is none; like: [n, 1]."""
    return torch.zeros_like(like) if tail is None else tail[:, None]
