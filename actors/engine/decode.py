"""Continuous batching: rollouts are written token by token, one slot each, and leave in chunks.

A slot freed by a stop or an end is refilled at the next step; this is where saved tokens become saved time.
What a rollout draws depends on its seed and its position only: neither on its slot nor on the rest of
the batch, and a rollout resumed elsewhere continues with the same draws.

The last token of a text is never in the cache: it is forwarded by the step that needs the logits after it.
So prefill needs no logits, and a new, a resumed and a running rollout are the same thing to a decode step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.adapters import Adapter, unpacked
from actors.engine.base import Base
from actors.engine.compiled import CompileError, check_close, compiled, in_few_sizes
from actors.engine.outcomes import PIECE_ROWS, log_outcomes, sample, student_support, support_size, uniforms
from actors.engine.shared import Shared
from actors.engine.slots import IntArray, padded, rectangles
from actors.engine.texts import TextSlots
from common import tracing
from common.failing import brief

Finish = Literal["eos", "length"]

_ROWS = 8  # a step's rows are a multiple of this
UNWATCHED_CHUNK = 64  # tokens of a chunk that nobody waits for: what a worker that dies may lose

NO_TOKENS = np.empty(0, dtype=np.int32)


def checked_text(
    key: str,
    prompt: NDArray[np.int32],
    generated: NDArray[np.int32],
    max_new_tokens: int,
    *,
    length: int,
    vocab_size: int,
) -> tuple[NDArray[np.int32], int]:
    """Prompt and completion so far of a rollout that a writer takes, int32 [m + n], and how long they may become.

    `length`: the most that the writer holds. Raises ValueError where they do not fit it, or a token is outside the
    vocabulary.
    """
    limit = len(prompt) + max_new_tokens
    if len(prompt) == 0 or limit > length or len(prompt) + len(generated) >= limit:
        raise ValueError(
            f"{key}: a prompt of {len(prompt)} tokens (at least 1) and {len(generated)} generated "
            f"of at most {max_new_tokens} do not fit a length of {length}"
        )
    text = np.concatenate([prompt, generated])
    if text.min() < 0 or text.max() >= vocab_size:
        raise ValueError(f"{key}: a token id is outside the vocabulary of {vocab_size}")
    return text, limit


@dataclass(frozen=True, slots=True)
class ClosedChunk:
    """Consecutive tokens of one rollout, written by one set of weights.

    key: the rollout. start: index of the first token in the completion. tokens: int32 [n], n >= 1; the last
    one is stop_ids[0] where any stop id was drawn. support_ids: int32 [n, K], the student's top K outcomes
    besides STOP; support_logprobs: float32 [n, K+1], column 0 STOP's; tail_logprobs: float32 [n], or None
    where the support is everything. rollout_logprobs: float32 [n], of the outcome drawn, over the full
    distribution at temperature 1; sampled_logprobs: float32 [n], the same as sampled, after temperature and
    top-p. finish: why the rollout ended with this chunk, or None. version: of the weights that wrote it; None: those
    that were swapped in last.
    """

    key: str
    start: int
    tokens: NDArray[np.int32]
    support_ids: NDArray[np.int32]
    support_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] | None
    rollout_logprobs: NDArray[np.float32]
    sampled_logprobs: NDArray[np.float32]
    finish: Finish | None
    version: int | None = None


class Decoder(TextSlots):
    """Writes up to `slots` rollouts at a time.

    max_length: tokens of prompt and completion together. stop_ids: U. vocab_size: logits beyond it are never
    drawn. teacher_top_k: K at most. chunk_tokens: length of a full chunk, see `add`. prefill_tokens: most tokens,
    padding included, that one step prefills. temperature, top_p: how outcomes are drawn. alone: every row is
    forwarded by itself, and what a rollout had generated before it was resumed token by token, as it was
    written: slower by the number of slots, and the same to the last bit whatever shares the batch, in
    whichever slot, resumed or not. base: digest of the model's weights, if adapters are to be swapped in. Raises
    UnsupportedModelError, ValueError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        teacher_top_k: int,
        chunk_tokens: int,
        prefill_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        alone: bool = False,
        base: str | None = None,
    ) -> None:
        super().__init__(
            model,
            slots=slots,
            max_length=max_length,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
            prefill_tokens=prefill_tokens,
        )
        self._first_column = torch.zeros(1, dtype=torch.int64, device=self._model.device)
        self._all = np.arange(slots)
        self._top_k, self._support = teacher_top_k, support_size(teacher_top_k, vocab_size, len(stop_ids))
        self._chunk_tokens = chunk_tokens
        self._longest_chunk = max(chunk_tokens, UNWATCHED_CHUNK)
        self._temperature, self._top_p = temperature, top_p
        self._alone = alone
        self._base = Base(model, base)
        self.decoded_tokens = 0
        self._outcomes_of = self._outcomes

        # `_slot` is in the order of admission, which is the order of prefill.
        self._keys: list[str | None] = [None] * slots
        self._chunk = np.zeros(slots, dtype=np.int64)  # place in the text where the open chunk begins
        self._watched = np.zeros(slots, dtype=np.int64)  # tokens known from which on chunks have the config's length
        self._limit = np.zeros(slots, dtype=np.int64)  # tokens known at which the rollout ends by length
        self._seeds = np.zeros(slots, dtype=np.uint64)
        self._used = np.zeros(slots, dtype=bool)
        self._held = np.zeros(slots, dtype=bool)
        # A step's numbers come from the device as one int32 row a slot; floats travel as their bits. Layout:
        # token, support ids [K], rollout_logprob, sampled_logprob, tail_logprob (0 where absent),
        # support_logprobs [K+1].
        self._record = np.zeros((slots, self._longest_chunk, 2 * self._support + 5), dtype=np.int32)

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def free(self) -> int:
        """Slots that `add` may fill."""
        return len(self._keys) - len(self._slot)

    @property
    def busy(self) -> tuple[str, ...]:
        """Keys of the rollouts in slots, in the order of admission."""
        return tuple(self._slot)

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
        """Give a rollout a slot.

        `prompt` int32 [m], m >= 1; `generated` int32 [n], the completion so far where the rollout is resumed:
        it continues at position n with the same draws. `max_new_tokens` counts the whole
        completion. `seed` is taken modulo 2**64. `unwatched`: until the completion has so many tokens, a chunk
        ends at 64 tokens (or at `chunk_tokens`, if that is more). Raises ValueError where the lengths do not
        fit, a token is outside the vocabulary or the key is here already, RuntimeError where no slot is free.
        """
        text, limit = checked_text(
            key, prompt, generated, max_new_tokens, length=self._text.shape[1], vocab_size=self._vocab_size
        )
        begin = len(text)
        if key in self._slot:
            raise ValueError(f"{key} is being written already")
        if not self.free:
            raise RuntimeError(f"{key}: no free slot")
        slot = self._keys.index(None)
        self._slot[key], self._keys[slot] = slot, key
        self._text[slot, :begin] = text
        self._prompt[slot], self._known[slot], self._cached[slot] = len(prompt), begin, 0
        self._chunk[slot], self._limit[slot] = begin, limit
        self._watched[slot] = len(prompt) + unwatched
        self._seeds[slot] = np.uint64(seed % 2**64)
        self._used[slot], self._held[slot] = True, False

    def remove(self, key: str) -> int:
        """Free a rollout's slot at once, its open chunk included; returns the tokens generated in all.

        Raises KeyError where the rollout is not here, e.g. has ended.
        """
        slot = self._slot.pop(key)
        self._keys[slot], self._used[slot] = None, False
        return int(self._known[slot] - self._prompt[slot])

    def discard(self, key: str) -> int:
        """`remove` of a rollout on which the model failed, with all that it left in the cache."""
        slot = self._slot[key]
        self._model.clear(np.array([slot]))
        self._cached[slot] = 0
        return self.remove(key)

    def hold(self, key: str) -> None:
        """Keep a rollout in its slot without decoding it (it is still prefilled). Raises KeyError."""
        self._held[self._slot[key]] = True

    def release(self, key: str) -> None:
        """Let a held rollout go on. Raises KeyError."""
        self._held[self._slot[key]] = False

    def step(self, only: Sequence[str] | None = None) -> list[ClosedChunk]:
        """Prefill a little, decode one token for every ready rollout (of `only`, if given); returns the chunks that are
        full or final.

        A rollout whose prefill ends in this step is decoded in it. A rollout that ends leaves its slot. Raises
        FloatingPointError where the model's logits are not numbers, and whatever the model raises: no rollout has got
        further then, and the step may be tried again.
        """
        at_work = self._used
        if only is not None:
            at_work = np.zeros_like(self._used)
            at_work[[self._slot[key] for key in only]] = True
        self._prefill(at_work)
        ready = np.flatnonzero(at_work & ~self._held & (self._cached + 1 == self._known))
        return self._decode(ready) if len(ready) else []

    def close_chunks(self) -> list[ClosedChunk]:
        """Close every open chunk that is not empty: before the weights change, or to drain."""
        return [self._close(slot, None) for slot in self._open()]

    def read_weights(self, data: bytes) -> Mapping[str, Tensor] | Adapter:
        """The content of a published file, for `swap`. Nothing changes: any thread may call it. Raises ValueError, also
        for an adapter of another base, and SafetensorError."""
        weights = unpacked(data)
        if isinstance(weights, Adapter):
            self._base.check(weights)
        return weights

    def attach(self, shared: Shared) -> bool:
        """Slots are ready as soon as they are there: True."""
        return True

    def swap(self, weights: Mapping[str, Tensor] | Adapter, version: int = 0) -> None:
        """Load new weights in place, or merge an adapter into those of the model's folder; the cache, and so what
        rollouts have read, stays.

        Raises ValueError where they do not fit (nothing has changed then), RuntimeError where a chunk is
        open: a chunk is written by one set of weights.
        """
        if self._open():
            raise RuntimeError("close_chunks() before swap(): a chunk is written by one set of weights")
        if isinstance(weights, Adapter):
            self._base.merge(weights)
        else:
            self._model.load(weights)
            self._base.replaced()
        self._prompts.clear()  # what is held of them is of the old weights

    def _open(self) -> list[int]:
        """Slots whose open chunk is not empty."""
        return [slot for slot in self._slot.values() if self._known[slot] > self._chunk[slot]]

    def _prefill(self, at_work: NDArray[np.bool_]) -> None:
        left = self._known - 1 - self._cached
        waiting = [slot for slot in self._slot.values() if at_work[slot] and left[slot] > 0]
        if self._alone:
            # The prompt as usual; after it one token per forward, as it was written.
            waiting = waiting[:1]
            of_prompt = self._prompt - 1 - self._cached
            left = np.where(of_prompt > 0, of_prompt, left.clip(max=1))
        else:
            waiting = self._without_shared(waiting)
            left = self._known - 1 - self._cached
        taken = rectangles((int(left[slot]) for slot in waiting), self._prefill_tokens)
        if not taken:
            return
        rows, lengths = np.array(waiting[: len(taken)]), np.array(taken)
        starts = self._cached[rows]
        tokens = [self._text[row, at : at + n] for row, at, n in zip(rows, starts, lengths, strict=True)]
        with tracing.span("prefill", rows=len(rows), tokens=int(lengths.sum())):
            self._model.forward(rows, padded(tokens), starts, lengths, [])
        self._cached[rows] += lengths

    def _without_shared(self, waiting: list[int]) -> list[int]:
        """Of the slots to prefill, those that must compute it: the prompt of a group of rollouts is computed once, and
        copied. One that waits for the first of its group comes later."""
        still = set(waiting)
        rest = []
        for slot in waiting:
            length = int(self._prompt[slot])
            first = self._share_prompt(slot, length) if self._cached[slot] < length - 1 else slot
            done = self._cached[slot] == self._known[slot] - 1
            waits = first != slot and first in still and self._cached[slot] < length - 1
            if not (done or waits):
                rest.append(slot)
        return rest

    def _decode(self, ready: IntArray) -> list[ClosedChunk]:
        """One token for each slot of `ready`."""
        if self._alone:
            record = np.concatenate([self._draw(slot, np.ones(1, dtype=np.int64)) for slot in ready[:, None]])
        else:
            # Slots in one piece, so that their cache is not copied, and few different shapes. Free slots are filled
            # from the first on, so those in use are close together.
            rows = self._all[: self._rows_for(int(ready[-1]) + 1)]
            active = np.zeros(len(rows), dtype=np.int64)
            active[ready] = 1
            record = self._draw(rows, active)[ready]
        if not np.isfinite(record[:, self._support + 1].view(np.float32)).all():
            self._prompts.clear()  # the prompt of one that failed is not copied to others
            raise FloatingPointError("the student's logits are not finite")
        self._record[ready, (self._known - self._chunk)[ready]] = record
        self._text[ready, self._known[ready]] = record[:, 0]
        self._known[ready] += 1
        self._cached[ready] += 1
        self.decoded_tokens += len(ready)
        return self._close_finished(ready, record[:, 0])

    def _rows_for(self, needed: int) -> int:
        if self._model.graphs:
            return in_few_sizes(needed, least=_ROWS, most=len(self._all))
        return min(-(-needed // _ROWS) * _ROWS, len(self._all))

    def compile(self) -> None:
        """Compile the decode step, before the first rollout, and check that it computes the same. Takes half a minute
        or more where torch has not cached the code. Raises CompileError; the step is then as it was."""
        assert not self._slot
        length = self._text.shape[1]
        shapes = [(self._rows_for(1), length // 2), (len(self._all), length)]
        plain = [self._probe(*shape) for shape in shapes]
        try:
            self._model.compile()
            self._outcomes_of = compiled(self._outcomes, self._model.device)
            for shape, wanted in zip(shapes, plain, strict=True):
                found = self._probe(*shape)
                check_close("logits", found[0], wanted[0], self._model.model.dtype)
                check_close("log-probabilities", found[1], wanted[1], self._model.model.dtype)
        except Exception as error:
            self._model.uncompile()
            self._outcomes_of = self._outcomes
            raise CompileError(f"the decode step cannot be compiled: {brief(error)}") from error

    @torch.inference_mode()
    def _probe(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Logits of a step of so many empty slots, at positions below `length`, and the support's log-probabilities."""
        tokens = np.arange(rows)[:, None] % self._vocab_size
        starts = np.linspace(0, length - 1, rows).astype(np.int64)
        ones = np.ones(rows, dtype=np.int64)
        self._model.clear(self._all[:rows])
        logits = self._model.forward(self._all[:rows], tokens, starts, ones, self._first_column)[:, 0].clone()
        record = self._outcomes_of(logits, torch.full((rows,), 0.5, dtype=torch.float64, device=logits.device))
        return logits, record[:, self._support + 3 :].contiguous().view(torch.float32).clone()

    @torch.inference_mode()
    def _draw(self, rows: IntArray, active: IntArray) -> NDArray[np.int32]:
        """Forward the last token of the rows that are active (1, else 0), and draw the next."""
        last = self._known[rows] - active
        tokens = self._text[rows, last * active]
        logits = self._model.forward(rows, tokens[:, None], last, active, self._first_column)[:, 0]
        draws = uniforms(self._seeds[rows], (self._known - self._prompt)[rows])
        pieces = zip(
            torch.split(logits, PIECE_ROWS),
            torch.split(torch.from_numpy(draws).to(logits.device), PIECE_ROWS),
            strict=True,
        )
        record = torch.cat([self._outcomes_of(*piece) for piece in pieces])
        on_host: NDArray[np.int32] = record.cpu().numpy()
        return on_host

    def _outcomes(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Draw, and gather what is kept of it: int32 [rows, 2K+5], the only transfer from the device."""
        log_probs = log_outcomes(logits, self._stops, self._vocab_size)
        outcome, sampled = sample(log_probs, draws, self._temperature, self._top_p)
        drawn = outcome[:, None]
        rollout = log_probs.gather(1, drawn)
        ids, support, tail = student_support(log_probs, self._stop_ids[0], self._top_k, stop_count=len(self._stop_ids))
        absent = torch.zeros_like(rollout) if tail is None else tail[:, None]
        numbers = torch.cat([rollout, sampled[:, None], absent, support], dim=1)
        return torch.cat([drawn.int(), ids.int(), numbers.view(torch.int32)], dim=1)

    def _close_finished(self, ready: IntArray, tokens: NDArray[np.int32]) -> list[ClosedChunk]:
        known = self._known[ready]
        ended = tokens == self._stop_ids[0]
        long = known == self._limit[ready]
        length = known - self._chunk[ready]
        watched = known >= self._watched[ready]
        full = (length == self._longest_chunk) | (watched & (length >= self._chunk_tokens))
        closed = []
        for place in np.flatnonzero(ended | long | full):
            finish: Finish | None = "eos" if ended[place] else "length" if long[place] else None
            closed.append(self._close(int(ready[place]), finish))
        return closed

    def _close(self, slot: int, finish: Finish | None) -> ClosedChunk:
        """Cut the open chunk off, and free the slot where the rollout has ended."""
        key = self._keys[slot]
        assert key is not None
        length = int(self._known[slot] - self._chunk[slot])
        # One copy for the chunk: the record is written over by the next.
        record = self._record[slot, :length].copy()
        numbers = record[:, self._support + 1 :].view(np.float32)
        everything = self._vocab_size - len(self._stop_ids) <= self._support
        chunk = ClosedChunk(
            key=key,
            start=int(self._chunk[slot] - self._prompt[slot]),
            tokens=np.ascontiguousarray(record[:, 0]),
            support_ids=np.ascontiguousarray(record[:, 1 : self._support + 1]),
            support_logprobs=np.ascontiguousarray(numbers[:, 3:]),
            tail_logprobs=None if everything else np.ascontiguousarray(numbers[:, 2]),
            rollout_logprobs=np.ascontiguousarray(numbers[:, 0]),
            sampled_logprobs=np.ascontiguousarray(numbers[:, 1]),
            finish=finish,
        )
        self._chunk[slot] = self._known[slot]
        if finish:
            self.remove(key)
        return chunk
