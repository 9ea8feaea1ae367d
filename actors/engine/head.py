"""The output head of a half-precision model, with a product in float32.

A head in bfloat16 rounds its logits to 8 bits: two models with the same distribution would then be 1e-3 nats apart,
as far as in a trap. Products of 16-bit numbers are exact in float32, so what is multiplied stays as it is and only
the sum is kept wider.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger("katana.engine")

_PIECE = 1 << 18
"""Numbers of the weight that are float32 at a time, 1 MB: they stay in the processor's cache, and a copy of a head of
151,936 x 1,024 would be 600 MB."""


class Float32Head(nn.Linear):
    """A linear layer of float16 or bfloat16 weights whose output is float32; without gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] of any float dtype; returns float32 [..., out]."""
        rows = input.reshape(-1, input.shape[-1])
        out = _product(rows, self.weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], len(self.weight))


def widen_head(model: PreTrainedModel) -> None:
    """Let a model's head multiply in float32, in place: its parameters, their names and ties stay.

    Nothing changes where the head's weights are float32 or float64. A head that is not a plain `nn.Linear` (a
    quantized one, say, or none that the model names) is left unchanged, with a warning.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear:
        if head.weight.dtype in (torch.bfloat16, torch.float16):
            # Change its class, not the module: references and hooks stay valid.
            head.__class__ = Float32Head
    elif not isinstance(head, Float32Head) and model.dtype in (torch.bfloat16, torch.float16):
        log.warning(
            "%s: its head is %s, not nn.Linear; its logits stay %s, which adds about 1e-3 nats to every divergence",
            type(model).__name__,
            type(head).__name__,
            model.dtype,
        )


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, in] times weight [out, in], transposed: float32 [N, out]."""
    if rows.dtype == weight.dtype and _multiplies_into_float32(weight.device, weight.dtype):
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    out = rows.new_empty(len(rows), len(weight), dtype=torch.float32)
    if not len(rows):  # a prefill asks for no logits: nothing to widen a weight for
        return out
    rows = rows.float()
    size = max(1, _PIECE // weight.shape[1])
    for piece, columns in zip(torch.split(weight, size), torch.split(out, size, dim=1), strict=True):
        torch.mm(rows, piece.float().t(), out=columns)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a product with a wider result on this device: yes on CUDA, no on CPU."""
    return _tried_once(device, dtype)


@cache
def _tried_once(device: torch.device, dtype: torch.dtype) -> bool:
    tiny = torch.zeros(8, 8, device=device, dtype=dtype)
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32)
    except torch.OutOfMemoryError:  # no answer to the question
        raise
    except (NotImplementedError, RuntimeError):
        return False
    return True
