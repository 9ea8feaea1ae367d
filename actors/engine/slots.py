"""A causal language model whose cache has slots, each at its own position.

`SlotModel.forward` runs any subset of the slots, each from its own position on; rows of different lengths are
padded on the right. What makes that safe is one rule: **padding and idle rows write to a scrap position that
no query can see**, so a cache row only ever holds what was written for it, and only as far as its owner
counts.

Works on whatever device and in whatever dtype the model has. Rollouts are unknown here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from actors.engine.head import widen_head
from actors.engine.memory import free_bytes
from common.failing import out_of_memory
from common.pretrained import ModelError, unfit

IntArray = NDArray[np.int64]

KV_BLOCK = 32
"""The length of the cache that attention reads is a multiple of this: few shapes, and aligned for CUDA
kernels."""


class UnsupportedModelError(ModelError):
    """The model cannot run on slots: its attention is not full, or its results would differ."""


def check_full_attention(config: Any) -> None:
    """Refuse a model that has a layer without its own full causal attention.

    `config` is a transformers configuration. Raises UnsupportedModelError that names the first such layer and
    its type.
    """
    text = config.get_text_config()
    name = type(text).__name__
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    unnamed = "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [unnamed] * text.num_hidden_layers
    for layer, kind in enumerate(types):
        if kind != "full_attention":
            raise UnsupportedModelError(f"{name}: layer {layer} is {kind!r}, slots need 'full_attention'")
    for layer, kind in enumerate(getattr(text, "attention_layers", [])):  # GPT-Neo's own name
        if kind != "global":
            raise UnsupportedModelError(f"{name}: layer {layer} is {kind!r}, slots need full attention")
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name}: {text.num_kv_shared_layers} layers share the keys of others")
    if getattr(text, "is_encoder_decoder", False) or not getattr(text, "is_causal", True):
        raise UnsupportedModelError(f"{name}: not a causal decoder")


def check_positions(config: Any, length: int) -> None:
    """Refuse a model whose positions go wrong in slots with texts of up to `length` tokens, where `self_test` is too
    short to see it.

    `config` is a transformers configuration. Raises UnsupportedModelError.
    """
    text = config.get_text_config()
    if reason := unfit(text.to_dict(), length):
        raise UnsupportedModelError(f"{type(text).__name__}: {reason}")


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [slots, capacity + 1, heads, head_dim]: the last position is the scrap
    one.

    Stored with positions before heads, so that a token is one row to write; read as [rows, heads, length,
    head_dim].
    """

    is_sliding = False

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots, self._capacity = slots, capacity
        self.writes: Tensor | None = None
        self.rows: Tensor | slice = slice(None)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, with the heads, widths, dtype and device of the first states seen."""
        # Zeros, not whatever is there: a masked position still enters attention as 0 * value, and 0 * nan is
        # nan.
        self.keys, self.values = (
            states.new_zeros(self._slots, self._capacity + 1, states.shape[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, T, head_dim] at `writes`; return `rows` up to `length`, [rows, heads, length,
        head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _put(self, stored: Any, states: Tensor) -> Tensor:
        flat = states.transpose(1, 2).reshape(-1, states.shape[1] * states.shape[3])
        stored.view(-1, flat.shape[1]).index_copy_(0, self.writes, flat)
        # A slice of rows is a view; only a scattered subset is copied.
        seen: Tensor = stored[:, : self.length][self.rows]
        return seen.transpose(1, 2)

    def clear(self, rows: Tensor) -> None:
        """Zeros again, as allocated: see `lazy_initialization`."""
        held: Any = (self.keys, self.values)
        if self.is_initialized:
            for stored in held:
                stored[rows] = 0

    def resize(self, slots: int) -> None:
        """Keep the first `slots`, or add empty ones."""
        if self.keys is not None:
            self.keys, self.values = (_resized(stored, slots) for stored in (self.keys, self.values))
        self._slots = slots

    @property
    def slot_bytes(self) -> int:
        """Of one slot; 0 before the first forward."""
        return 0 if self.keys is None else 2 * self.keys[0].nbytes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self._capacity


def _resized(stored: Any, slots: int) -> Tensor:
    if slots <= len(stored):
        kept: Tensor = stored[:slots]
        return kept
    grown: Tensor = stored.new_zeros(slots, *stored.shape[1:])
    grown[: len(stored)] = stored
    return grown


class SlotCache(Cache):
    """A transformers cache of slots; `aim` sets the rows of the next forward and where it writes."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self._slot_layers = [SlotLayer(slots, capacity) for _ in range(layers)]
        super().__init__(layers=[*self._slot_layers])
        self.capacity = capacity

    def aim(self, rows: Tensor | slice, writes: Tensor, length: int) -> None:
        """`rows` int64 [b] or a slice; `writes` int64 [b*T], row * (capacity + 1) + position; `length` to be
        read."""
        for layer in self._slot_layers:
            layer.rows, layer.writes, layer.length = rows, writes, length

    def clear(self, rows: Tensor) -> None:
        for layer in self._slot_layers:
            layer.clear(rows)

    def resize(self, slots: int) -> None:
        for layer in self._slot_layers:
            layer.resize(slots)

    @property
    def slot_bytes(self) -> int:
        return sum(layer.slot_bytes for layer in self._slot_layers)


class SlotModel:
    """A causal language model over slots, without gradients.

    `model` is switched to eval mode, to sdpa attention and to a head that multiplies in float32 (see
    `actors.engine.head.widen_head`). Raises UnsupportedModelError.
    """

    def __init__(self, model: PreTrainedModel, *, slots: int, capacity: int) -> None:
        check_full_attention(model.config)
        check_positions(model.config, capacity)
        if getattr(model, "_is_stateful", False):
            raise UnsupportedModelError(f"{type(model).__name__} is recurrent")
        _use_sdpa(model)
        widen_head(model)
        self.model = model
        model.train(False)
        self.slots, self.capacity = slots, capacity
        self.device = model.device
        text: Any = model.config.get_text_config()
        self._cache = SlotCache(text.num_hidden_layers, slots, capacity)
        self._places = torch.arange(capacity, device=self.device)

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
        writes = slots[:, None] * (self.capacity + 1) + np.where(valid, positions, self.capacity)
        longest = int(positions.max()) + 1
        if longest > self.capacity:
            raise ValueError(f"position {longest - 1} is beyond the capacity of {self.capacity} tokens")
        length = min(-(-longest // KV_BLOCK) * KV_BLOCK, self.capacity)
        sent, placed, written = self._send(np.stack([tokens, positions, writes])).unbind(0)
        self._cache.aim(self._rows(rows), written.reshape(-1), length)
        output: Any = self.model(
            input_ids=sent,
            position_ids=placed,
            attention_mask=self._places[:length] <= placed[:, None, :, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.as_tensor(logits_at, dtype=torch.int64, device=self.device),
        )
        logits: Tensor = output.logits
        return logits

    @torch.inference_mode()
    def clear(self, rows: IntArray) -> None:
        """Zero the slots: values that are not finite would reach the next rollout through masked positions."""
        self._cache.clear(self._send(rows))

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

    def _rows(self, rows: IntArray | None) -> Tensor | slice:
        """Rows as a slice where they follow each other: that is a view into the cache, not a copy of it."""
        if rows is None:
            return slice(None)
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return slice(first, last + 1)
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


def _use_sdpa(model: PreTrainedModel) -> None:
    """sdpa reads a boolean mask as a mask; eager attention would add it."""
    if model.config._attn_implementation != "sdpa":
        with suppress(ValueError):  # raised by some models that have none; others stay as they are
            model.set_attn_implementation("sdpa")
    if model.config._attn_implementation != "sdpa":
        raise UnsupportedModelError(f"{type(model).__name__} has no sdpa attention")


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


@torch.inference_mode()
def self_test(model: PreTrainedModel, *, vocab_size: int, seed: int = 0) -> float:
    """Compare ragged rows through slots with a plain forward; returns the largest difference found.

    The difference is relative to the largest plain logit (or 1). Beyond 1e-3 (5e-2 in 16 bits) raises
    UnsupportedModelError that states it.
    """
    lengths = np.array([5, 37, 1, 18])
    order, cut = np.array([3, 0, 1]), lengths // 2
    texts = np.random.default_rng(seed).integers(0, vocab_size, size=(4, int(lengths.max())))
    slots = SlotModel(model, slots=4, capacity=40)
    # A subset of the rows, out of order; then all of them, one of which is still empty; then the last tokens.
    slots.forward(order, texts[order], 0 * order, cut[order], [])
    rest = padded([text[c : n - 1] for text, c, n in zip(texts, cut, lengths, strict=True)])
    slots.forward(None, rest, cut, lengths - 1 - cut, [])
    last = texts[np.arange(4), lengths - 1]
    got = slots.forward(None, last[:, None], lengths - 1, np.ones(4, dtype=np.int64), [0])[:, 0].float()
    worst = 0.0
    for row, length in enumerate(lengths):
        ids = torch.from_numpy(texts[row : row + 1, :length]).to(model.device)
        plain: Tensor = slots.model(input_ids=ids, use_cache=False).logits[0, -1].float()
        differs = float((got[row] - plain).abs().max() / plain.abs().max().clamp(min=1.0))
        worst = worst if differs <= worst else differs  # NaN is the worst; max() would lose it
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not worst <= limit:
        raise UnsupportedModelError(
            f"{type(model).__name__}: logits through slots differ from a plain forward by {worst:.3g}, "
            f"more than {limit}"
        )
    return worst
