"""A causal language model whose cache has slots, each at its own position.

`SlotModel.forward` runs any subset of the slots, each from its own position on; rows of different lengths are
padded on the right. What makes that safe is one rule: **padding and idle rows write to a scrap position that
no query can see**, so a cache row only ever holds what was written for it, and only as far as its owner
counts.

Works on whatever device and in whatever dtype the model has. Rollouts are unknown here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from actors.engine.apart import Apart
from actors.engine.attention import Masks, UnsupportedModelError, check_attention, check_positions, set_attention
from actors.engine.compiled import SHORTEST, compiled, in_few_sizes, next_step
from actors.engine.head import widen_head
from actors.engine.memory import free_bytes
from common.failing import out_of_memory

IntArray = NDArray[np.int64]

KV_BLOCK = 32
"""The length of the cache that attention reads is a multiple of this: few shapes, and aligned for CUDA
kernels."""


SMALL_PIECE = 128 * 1024
"""Bytes of a head's keys up to which a gap after them costs more than reading it."""


class _Aim:
    """Which rows the next forward runs, where it writes and how far it reads; shared by all layers.

    All that changes from step to step is a tensor or its shape, so that a compiled step is compiled once.
    rows: int64 [b], None for the first b slots, or a slice. slots int64 [b, 1], the same rows; places int64 [b, T], the
    positions to write at; reads: int64 [length], the positions to read.
    """

    def __init__(self) -> None:
        self.rows: Tensor | slice | None = None
        self.slots = self.places = self.reads = torch.zeros(0, dtype=torch.int64)

    def set(self, rows: Tensor | slice | None, slots: Tensor, places: Tensor, reads: Tensor) -> None:
        self.rows, self.slots, self.places, self.reads = rows, slots, places, reads

    @property
    def length(self) -> int:
        return len(self.reads)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [slots, heads, capacity + 1, head_dim]: the last position is the scrap one.

    Heads stand before positions, so that attention reads each head's keys in one piece: with many rows a decode step
    waits for memory, and the other order takes two to four times as long (BENCHMARKS.md).
    """

    is_sliding = False

    def __init__(self, slots: int, capacity: int, aim: _Aim) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots, self._capacity, self._aim = slots, capacity, aim

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, with the heads, widths, dtype and device of the first states seen."""
        # Zeros, not whatever is there: a masked position still enters attention as 0 * value, and 0 * nan is
        # nan.
        self.keys, self.values = (
            states.new_zeros(self._slots, states.shape[1], self._capacity + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        _mark_static(self.keys, self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, T, head_dim] where the cache aims; return its rows as far as they are read, [rows,
        heads, length, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _put(self, stored: Any, states: Tensor) -> Tensor:
        aim, device = self._aim, stored.device  # of this layer: a large model is on several
        stored[aim.slots.to(device), :, aim.places.to(device)] = states.transpose(1, 2)
        seen: Tensor = stored[:, :, : aim.length]
        if aim.rows is None:
            return seen[: len(states)]
        # A slice of rows is a view; only a scattered subset is copied, by an operation that is several times as fast as
        # indexing.
        return seen[aim.rows] if isinstance(aim.rows, slice) else seen.index_select(0, aim.rows.to(device))

    def clear(self, rows: Tensor) -> None:
        """Zeros again, as allocated: see `lazy_initialization`."""
        held: Any = (self.keys, self.values)
        if self.is_initialized:
            for stored in held:
                stored[rows] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot, to another."""
        held: Any = (self.keys, self.values)
        for stored in held:
            stored[target, :, :length] = stored[source, :, :length]

    def resize(self, slots: int) -> None:
        """Keep the first `slots`, or add empty ones."""
        if self.keys is not None:
            self.keys, self.values = (_resized(stored, slots) for stored in (self.keys, self.values))
            _mark_static(self.keys, self.values)
        self._slots = slots

    @property
    def slot_bytes(self) -> int:
        """Of one slot; 0 before the first forward."""
        return 0 if self.keys is None else 2 * self.keys[0].nbytes

    @property
    def head_bytes(self) -> int:
        """Of the keys of one head in one slot; 0 before the first forward."""
        return 0 if self.keys is None else int(self.keys[0, 0].nbytes)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._aim.length, 0

    def get_seq_length(self) -> int:
        return self._aim.length

    def get_max_length(self) -> int:
        return self._capacity


def _mark_static(*tensors: Tensor) -> None:
    """A CUDA graph may write into them: they stay where they are."""
    for tensor in tensors:
        if tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)


def _resized(stored: Any, slots: int) -> Tensor:
    if slots <= len(stored):
        kept: Tensor = stored[:slots]
        return kept
    grown: Tensor = stored.new_zeros(slots, *stored.shape[1:])
    grown[: len(stored)] = stored
    return grown


class SlotCache(Cache):
    """A transformers cache of slots; `aim.set` says which rows the next forward runs and where it writes."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self.aim = _Aim()
        self._slot_layers = [SlotLayer(slots, capacity, self.aim) for _ in range(layers)]
        super().__init__(layers=[*self._slot_layers])
        self.capacity = capacity

    def clear(self, rows: Tensor) -> None:
        for layer in self._slot_layers:
            layer.clear(rows)

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self._slot_layers:
            layer.copy(source, target, length)

    def resize(self, slots: int) -> None:
        for layer in self._slot_layers:
            layer.resize(slots)

    @property
    def head_bytes(self) -> int:
        """Of the keys of one head of a layer in one slot, at most."""
        return max(layer.head_bytes for layer in self._slot_layers)

    @property
    def slot_bytes(self) -> int:
        return sum(layer.slot_bytes for layer in self._slot_layers)


class SlotModel:
    """A causal language model over slots, without gradients.

    `model` is switched to eval mode, to sdpa attention (eager where it has none) and to a head that multiplies in
    float32 (see `actors.engine.head.widen_head`). Raises UnsupportedModelError.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, capacity: int) -> None:
        check_attention(model.config)
        check_positions(model.config, capacity)
        if getattr(model, "_is_stateful", False):
            raise UnsupportedModelError(f"{type(model).__name__} is recurrent")
        attention = set_attention(model)
        widen_head(model)
        self.model = model
        model.train(False)
        self.slots, self.capacity = slots, capacity
        self.device = model.device
        text: Any = model.config.get_text_config()
        self._cache = SlotCache(text.num_hidden_layers, slots, capacity)
        self._masks = Masks(model, attention)
        self._places = torch.arange(capacity, device=self.device)
        self._compiled: Callable[..., Tensor] | None = None

    @torch.inference_mode()
    def forward(
        self,
        rows: IntArray | None,
        tokens: IntArray,
        starts: IntArray,
        lengths: IntArray,
        logits_at: Sequence[int] | Tensor,
    ) -> Tensor:
        """Run `rows` (None: all slots, in order) from their positions on.

        `tokens` int64 [b, T]: row i holds lengths[i] tokens, the first at position starts[i], then padding; a
        row of length 0 changes nothing. `logits_at` int64 [c]: the columns of `tokens` to return logits at,
        possibly none. Returns logits [b, c, W], float32 of a model in half precision and else of its dtype; those of
        padding mean nothing.
        """
        width = tokens.shape[1]
        columns = np.arange(width)
        valid = columns < lengths[:, None]
        # A padding query sits at position 0: it sees one key, so its softmax, and what it writes, is a
        # number.
        positions = np.where(valid, starts[:, None] + columns, 0)
        slots = np.arange(self.slots) if rows is None else rows
        places = np.where(valid, positions, self.capacity)
        longest = int(positions.max()) + 1
        if longest > self.capacity:
            raise ValueError(f"position {longest - 1} is beyond the capacity of {self.capacity} tokens")
        length = min(-(-longest // KV_BLOCK) * KV_BLOCK, self.capacity)
        run, of_cache = self._run, self._rows(rows)
        # Not a prefill of one token, which wants no logits: that would be another shape to compile.
        if width == 1 and len(logits_at) and of_cache is None and self._compiled is not None:
            run = self._compiled
            next_step(self.device)
            if self.graphs:
                length = in_few_sizes(longest, least=SHORTEST, most=self.capacity)
        elif width == 1:
            length = self._read_by_one_query(length)
        # One transfer for all four.
        sent, placed, written, owners = self._send(
            np.stack([tokens, positions, places, np.broadcast_to(slots[:, None], tokens.shape)])
        ).unbind(0)
        kept = torch.as_tensor(logits_at, dtype=torch.int64, device=self.device)
        return run(of_cache, owners[:, :1], written, sent, placed, self._places[:length], kept)

    def _read_by_one_query(self, length: int) -> int:
        """How far to read for one query a row, at least `length`. On a CPU short pieces of memory with gaps between
        them are read at half the speed of one piece (DECISIONS 146): there all, if that is at most half as much
        again."""
        small = self.device.type == "cpu" and self._cache.head_bytes <= SMALL_PIECE
        return self.capacity if small and 3 * length >= 2 * self.capacity else length

    def _run(
        self,
        rows: Tensor | slice | None,
        slots: Tensor,
        written: Tensor,
        tokens: Tensor,
        positions: Tensor,
        reads: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """All of a forward that is done on the device: logits at the columns `kept`."""
        self._cache.aim.set(rows, slots, written, reads)
        output: Any = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks.at(positions, reads),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        logits: Tensor = output.logits
        return logits

    def states(self, rows: IntArray | None, tokens: IntArray, starts: IntArray, lengths: IntArray) -> Tensor:
        """As `forward`, but without logits: returns what `logits` makes them of, [b, T, H]."""
        if not self._apart.possible:
            return self.forward(rows, tokens, starts, lengths, range(tokens.shape[1]))
        with self._apart.seen() as seen:
            self.forward(rows, tokens, starts, lengths, [])
        return seen[0]

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, W] of some rows [n, H] of `states`."""
        return self._apart.logits(states) if self._apart.possible else states

    @cached_property
    def _apart(self) -> Apart:
        return Apart(self.model)

    @property
    def graphs(self) -> bool:
        """Whether steps are CUDA graphs: then few different shapes are worth more than small ones."""
        return self._compiled is not None and self.device.type == "cuda"

    def compile(self) -> None:
        """Compile the forward of one token for each of the first rows. Raises CompileError."""
        self._compiled = compiled(self._run, self.device)

    def uncompile(self) -> None:
        self._compiled = None

    @property
    def slot_bytes(self) -> int:
        """Of a slot's cache; 0 before the first forward."""
        return self._cache.slot_bytes

    @torch.inference_mode()
    def clear(self, rows: IntArray) -> None:
        """Zero the slots: values that are not finite would reach the next rollout through masked positions."""
        self._cache.clear(self._send(rows))

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Give a slot the first `length` positions that another holds: of the same text, so not computed again."""
        self._cache.copy(source, target, length)

    @torch.inference_mode()
    def grow(self, slots: int) -> bool:
        """Add empty slots until there are so many; what the others hold stays.

        False, and nothing has changed, where they would take more than a quarter of the memory that is free.
        """
        free = free_bytes(self.device)
        if free is None or 4 * (slots - self.slots) * self._cache.slot_bytes > free:
            return False
        try:
            self._cache.resize(slots)
        except Exception as error:
            self._cache.resize(self.slots)
            if not out_of_memory(error):
                raise
            return False
        self.slots = slots
        return True

    def _send(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _rows(self, rows: IntArray | None) -> Tensor | slice | None:
        """Rows as a slice where they follow each other: that is a view into the cache, not a copy of it. None if they
        are the first."""
        if rows is None:
            return None
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return slice(first, last + 1) if first else None
        return self._send(rows)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights into the model in place; what the cache holds stays.

        Every name of the model must be there, except one that shares its tensor with a name that is. Raises
        ValueError naming what is missing, unknown, of another shape or different from the tensor that it is tied to;
        nothing has changed then.
        """
        own: dict[str, Tensor] = self.model.state_dict()
        unknown = sorted(state.keys() - own.keys())
        given: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if name not in own:
                continue
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name}: shape {[*tensor.shape]}, the model has {[*own[name].shape]}")
            tied = given.setdefault(own[name].data_ptr(), tensor)
            if tied is not tensor and not torch.equal(tied, tensor):
                raise ValueError(f"{name} differs from the tensor that it is tied to in the model")
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in given]
        if unknown or missing:
            raise ValueError(f"weights do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, tensor in state.items():
            own[name].copy_(tensor)


def rectangles(goals: Iterable[int], budget: int) -> list[int]:
    """How many tokens each of the first rows may advance, so that rows times the longest stays within
    `budget`.

    `goals`: tokens left per row, in the order of service, each > 0. A first row longer than the budget is cut
    to it, so there is always progress; rows that do not fit are left for the next call.
    """
    taken: list[int] = []
    widest = 0
    for goal in goals:
        take = min(goal, budget)
        widest = max(widest, take)
        if taken and widest * (len(taken) + 1) > budget:
            break
        taken.append(take)
    return taken


def padded(pieces: Sequence[NDArray[Any]], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
    """Rows of different lengths side by side: [len(pieces), longest, ...], zeros after each."""
    out = np.zeros((len(pieces), max(map(len, pieces)), *pieces[0].shape[1:]), dtype=dtype)
    for row, piece in zip(out, pieces, strict=True):
        row[: len(piece)] = piece
    return out
