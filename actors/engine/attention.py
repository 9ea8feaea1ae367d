"""What a model's layers attend to, and the masks that say so for rows at positions of their own.

A sliding layer sees the last `sliding_window` positions, its own included: the rule of transformers' masks. Its cache
is as long as any other's, and the mask leaves out what the window has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.pretrained import FULL, SLIDING, ModelError, unfit, unfit_layers


class UnsupportedModelError(ModelError):
    """The model cannot run on slots: its attention is of another kind, or its results would differ."""


def check_attention(config: Any) -> None:
    """Refuse a model that has a layer without causal attention, full or sliding, over keys of its own.

    `config` is a transformers configuration. Raises UnsupportedModelError that names the layer, its type and the
    reason.
    """
    text = config.get_text_config()
    name = type(text).__name__
    types = {"layer_types": getattr(text, "layer_types", None)}  # a property of some, and so not in the dict
    if reason := unfit_layers(text.to_dict() | types):
        raise UnsupportedModelError(f"{name}: {reason}")
    if SLIDING in layer_kinds(text) and not getattr(text, "sliding_window", None):
        raise UnsupportedModelError(f"{name}: has {SLIDING!r} layers and no sliding_window; allowed: tokens, from 1")
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


ONE_QUERY = "katana_one_query"
"""sdpa, but for a decode step on a CPU in float32 two products of matrices: `one_query`."""


def set_attention(model: PreTrainedModel) -> str:
    """Switch a model to sdpa, or to eager attention where its class has no sdpa: sinks (gpt-oss) and caps on scores
    (Gemma 2) have no place in torch's. On a CPU in float32 sdpa is ONE_QUERY. Returns which."""
    summed = model.device.type == "cpu" and model.dtype == torch.float32 and model._supports_sdpa
    for name in (*([ONE_QUERY] if summed else []), "sdpa", "eager"):
        if model.config._attn_implementation != name:
            with suppress(ValueError):  # raised by classes that do not have it
                model.set_attn_implementation(name)
        if model.config._attn_implementation == name:
            return name
    raise UnsupportedModelError(f"{type(model).__name__} has neither sdpa nor eager attention")


def one_query(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a row as softmax(q kᵀ · scaling + mask) v: the rows' heads are a batch of matrices, which
    torch's CPU kernel for sdpa goes through half as fast where the keys come from memory (DECISIONS 146).

    query [b, h, 1, d]; key, value [b, g, length, d], each for h / g heads; mask [b, 1 or h, 1, length], numbers, or
    None. Returns [b, 1, h, d]. More queries, boolean masks, and options that it does not know, go to sdpa. (Vaswani et
    al. 2017, eq. 1.)
    """
    batch, heads, queries, width = query.shape
    boolean = attention_mask is not None and attention_mask.dtype == torch.bool
    unknown = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if queries != 1 or boolean or unknown or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    groups, length = key.shape[1:3]
    asked = query.reshape(batch * groups, heads // groups, width)
    scores = torch.bmm(asked, key.flatten(0, 1).transpose(1, 2)).view(batch, heads, length)
    factor = width**-0.5 if scaling is None else scaling
    scores = scores * factor if attention_mask is None else torch.add(attention_mask[:, :, 0], scores, alpha=factor)
    weights = scores.softmax(dim=-1).view(batch * groups, heads // groups, length)
    return torch.bmm(weights, value.flatten(0, 1)).view(batch, 1, heads, width), None


AttentionInterface.register(ONE_QUERY, one_query)
AttentionMaskInterface.register(ONE_QUERY, sdpa_mask)


class Masks:
    """Masks of one model for rows at positions of their own; raises UnsupportedModelError."""

    def __init__(self, model: PreTrainedModel, attention: str) -> None:
        """`attention`: as `set_attention` says. Eager attention and `one_query` add masks to their scores; sdpa reads
        booleans."""
        text: Any = model.config.get_text_config()
        self._kinds = layer_kinds(text)
        self._window = int(text.sliding_window) if SLIDING in self._kinds else 0
        self._attention = attention
        self._dtype = model.dtype

    def at(self, positions: Tensor, reads: Tensor) -> Tensor | dict[str, Tensor]:
        """Which of the keys at 0, 1, … (`reads` int64 [length]) each query sees: [b, 1, T, length] for queries at
        `positions` int64 [b, T].

        One mask for a model whose layers are alike, else one by type of layer, which is how transformers takes it.
        """
        length, queries = len(reads), positions[:, None, :, None]
        seen = {FULL: reads <= queries}
        if SLIDING in self._kinds:
            # A boolean tensor costs a pass over [b, T, length]: none where no query is beyond the window yet.
            seen[SLIDING] = seen[FULL] & (reads > queries - self._window) if length > self._window else seen[FULL]
        added = self._attention == "eager" or (self._attention == ONE_QUERY and positions.shape[1] == 1)
        masks = {kind: self._as_added(seen[kind]) if added else seen[kind] for kind in self._kinds}
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _as_added(self, seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(self._dtype).min)


def layer_kinds(text: Any) -> frozenset[str]:
    """The types of a text model's layers. Families whose layers are all alike name no types, only a window."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    unnamed = SLIDING if window else FULL
    return frozenset(getattr(text, "layer_types", None) or [unnamed])


@contextmanager
def short_window(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Give the sliding layers a window of at most so many tokens for a while, so that a short text goes beyond it.

    transformers reads the window from the configuration whenever it makes a mask. A model that kept it elsewhere would
    differ from the slots, and so be refused.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "sliding_window", None):
            configs[id(config)] = config
    before = [(config, config.sliding_window) for config in configs.values()]
    try:
        for config, was in before:
            config.sliding_window = min(was, window)
        yield
    finally:
        for config, was in before:
            config.sliding_window = was
