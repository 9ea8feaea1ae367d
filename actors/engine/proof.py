"""The engine's self-test: a model's logits through slots against its own plain forward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.attention import UnsupportedModelError, short_window
from actors.engine.slots import SlotModel, padded

_WINDOW = 8
"""Tokens that sliding layers see in the test, whose longest text has 37: real windows have up to 4,096, and a text of
that length would take seconds and more memory than a run."""


@torch.inference_mode()
def self_test(model: PreTrainedModel, *, vocab_size: int, seed: int = 0) -> float:
    """Compare ragged rows through slots with a plain forward; returns the largest difference found.

    The difference is relative to the largest plain logit (or 1). Beyond 1e-3 (5e-2 in 16 bits) raises
    UnsupportedModelError that states it.
    """
    with short_window(model, _WINDOW):
        worst = _difference(model, vocab_size, seed)
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not worst <= limit:
        raise UnsupportedModelError(
            f"{type(model).__name__}: logits through slots differ from a plain forward by {worst:.3g}, "
            f"more than {limit}"
        )
    return worst


def _difference(model: PreTrainedModel, vocab_size: int, seed: int) -> float:
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
    return worst
