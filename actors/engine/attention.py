"""What a model's layers attend to, and the masks that say so for rows at positions of their own.

A sliding layer sees the last `sliding_window` positions, its own included: the rule of transformers' masks. Its cache
is as long as any other's, and the mask leaves out what the window has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


def set_attention(model: PreTrainedModel) -> str:
    """Switch a model to sdpa, or to eager attention where its class has no sdpa: sinks (gpt-oss) and caps on scores
    (Gemma 2) have no place in torch's. Returns which."""
    for name in ("sdpa", "eager"):
        if model.config._attn_implementation != name:
            with suppress(ValueError):  # raised by classes that do not have it
                model.set_attn_implementation(name)
        if model.config._attn_implementation == name:
            return name
    raise UnsupportedModelError(f"{type(model).__name__} has neither sdpa nor eager attention")


class Masks:
    """Masks of one model for rows at positions of their own; raises UnsupportedModelError."""

    def __init__(self, model: PreTrainedModel, *, additive: bool) -> None:
        """`additive`: masks are numbers that eager attention adds to its scores, else booleans that sdpa reads."""
        text: Any = model.config.get_text_config()
        self._kinds = layer_kinds(text)
        self._window = int(text.sliding_window) if SLIDING in self._kinds else 0
        self._additive = additive
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
        masks = {kind: self._as_added(seen[kind]) if self._additive else seen[kind] for kind in self._kinds}
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
