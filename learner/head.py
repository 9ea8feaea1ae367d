"""A model's output head: what enters it, and how logits come of that.

Logits [kept tokens, vocabulary] would be by far the largest tensor of a step. So the model is called without its head,
and `learner.pieces` makes the logits of a few rows at a time. Some models scale or cap their logits after the head, in
their own forward: what they do is found out with numbers that are sent through it, and done again here.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.batch import MicroBatch

log = logging.getLogger("katana.learner")

_SENT = (0.0, 1.0, -1.0, 1e6, -1e6, 1e-3, -0.1, 0.5, -3.0, 8.0, -20.0, 30.0, -60.0, 150.0)
_ONE, _LARGE = _SENT.index(1.0), _SENT.index(1e6)


class UncastHead(nn.Linear):
    """A linear layer with float32 weights that autocast does not cast: bfloat16 logits are rounded to 8 bits, which
    adds about 1e-3 nats to every divergence."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in] of any float dtype; returns float32 [..., out], with gradients."""
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight, self.bias)


def keep_head_in_float32(model: Any) -> None:
    """Make the output head of a float32 model compute in float32 even under autocast, in place.

    A head that is not a plain `nn.Linear` has its own computation and is not changed, as in the engine.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = UncastHead  # change only the class: parameters, their names and ties stay


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A head whose logits are cap · tanh(scale · (weight · row + bias) / cap), or scale · (…) without a cap.

    `layer`: its weight [W, H] and bias [W] get their gradients here, added to `.grad` in place, since a second tensor
    of that size would be as large as the logits of thousands of rows.
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    def kept_rows(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return what enters the head for the N kept tokens, [N, H], in the trunk's dtype."""
        states = entering(model, self.layer, input_ids=micro_batch.input_ids)
        return states[micro_batch.logit_mask]

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """Write the logits of rows [n, H] into `out` [n, V], of the first V ids."""
        weight = self.layer.weight[: out.shape[1]]
        torch.mm(rows.to(weight.dtype), weight.t(), out=out)
        if self.layer.bias is not None:
            out += self.layer.bias[: out.shape[1]]
        if self.scale != 1.0:
            out *= self.scale
        if self.cap is not None:
            out.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: Tensor, rows: Tensor, logits: Callable[[], Tensor]) -> Tensor:
        """From the gradient [n, V] by the logits of `rows`, which is overwritten: add that of weight and bias, and
        return that by the rows, [n, H]. `logits`: gives them once more, in memory that may be overwritten."""
        width = gradient.shape[1]
        if self.cap is not None:
            slope = logits().div_(self.cap).square_().neg_().add_(1.0)
            gradient *= slope
        if self.scale != 1.0:
            gradient *= self.scale
        weight, bias = self.layer.weight, self.layer.bias
        if weight.requires_grad:
            _grad(weight)[:width].addmm_(gradient.t(), rows.to(weight.dtype))
        if bias is not None and bias.requires_grad:
            _grad(bias)[:width] += gradient.sum(dim=0)
        return gradient @ weight[:width]


@dataclass(frozen=True, slots=True)
class WholeHead:
    """A head of any other kind: the model makes the logits of all kept tokens, and they are the rows."""

    def kept_rows(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return the logits [N, W] that predict the kept tokens.

        With the mask as `logits_to_keep`, models of transformers select the rows *before* the head, so the full output
        [b, T, W] is never created. From one without that argument the rows are selected: the same numbers, more memory.
        """
        mask = micro_batch.logit_mask
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = mask
        logits: Tensor = model(input_ids=micro_batch.input_ids, **options).logits
        return logits if logits.dim() == 2 else logits[mask]

    def logits(self, rows: Tensor, out: Tensor) -> None:
        """Write the first V of rows [n, W] into `out` [n, V]. Raises ValueError if they are fewer."""
        if rows.shape[1] < out.shape[1]:
            raise ValueError(f"logits are {rows.shape[1]} wide, the vocabulary {out.shape[1]}")
        out.copy_(rows[:, : out.shape[1]])

    def backward(self, gradient: Tensor, rows: Tensor, logits: Callable[[], Tensor]) -> Tensor:
        """Return the gradient [n, V] by the logits as one by the rows, [n, W]."""
        return functional.pad(gradient, (0, rows.shape[1] - gradient.shape[1]))


OutputHead = LinearHead | WholeHead


def output_head(model: Any) -> OutputHead:
    """How to compute with a model's head; `WholeHead`, with a warning, if it is of no known kind."""
    layer = model.get_output_embeddings()
    head = linear_head(model, layer)
    if head is None or not _agrees(model, head):
        log.warning("%s: %s", type(model).__name__, WHOLE)
        return WholeHead()
    return head


WHOLE = "its output head is of no known kind, so the logits of a whole micro-batch are held in memory at once"
"""What a person is told about such a model."""


def linear_head(model: Any, layer: Any) -> LinearHead | None:
    """The model's head `layer` with what its forward does to the logits; None if it is of no known kind.

    The model may be on the meta device: only the numbers that are sent through what follows the head are real.
    """
    if type(layer) not in (nn.Linear, UncastHead):
        return None
    real = layer.weight if layer.weight.device.type != "meta" else torch.empty(0, dtype=layer.weight.dtype)
    width = len(layer.weight)
    sent = torch.tensor(_SENT, dtype=real.dtype, device=real.device)
    rows = sent.repeat(-(-3 * width // len(sent)))[: 3 * width].view(1, 3, width)
    with torch.no_grad(), _instead_of(layer, lambda states: rows):
        ids = torch.arange(3, device=layer.weight.device)[None]
        found = model(input_ids=ids, use_cache=False).logits
    if found.shape[-1] > width or found.shape[:-1] != (1, 3):
        return None
    came, went = found.double(), rows[..., : found.shape[-1]].double()
    scale = float(came.flatten()[_ONE])
    if torch.allclose(came, scale * went, rtol=1e-5, atol=1e-7):
        return LinearHead(layer, scale)
    cap = float(came.flatten()[_LARGE])
    if not 0.0 < scale < cap < 1e6:
        return None
    scale = cap * float(torch.atanh(torch.tensor(scale / cap, dtype=torch.float64)))
    scale = 1.0 if abs(scale - 1.0) < 1e-5 else scale
    known = torch.allclose(came, cap * (scale * went / cap).tanh(), rtol=1e-5, atol=1e-7)
    return LinearHead(layer, scale, cap) if known else None


def entering(model: nn.Module, layer: nn.Module, **inputs: Any) -> Tensor:
    """Return what enters a model's head `layer`, [b, T, H]; the head itself does not run. Raises RuntimeError if it is
    not called."""
    seen: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        seen.append(states)
        return states[..., :1]  # for the rest of the model's forward, whose result nobody reads

    with _instead_of(layer, keep):
        model(use_cache=False, **inputs)
    if not seen:
        raise RuntimeError(f"{type(model).__name__} does not call its output head")
    return seen[0]


@torch.no_grad()
def _agrees(model: Any, head: LinearHead) -> bool:
    """Whether the logits made here are the model's own, for a short text."""
    ids = torch.arange(3, device=head.layer.weight.device)[None]
    own = model(input_ids=ids, use_cache=False).logits[0]
    try:
        rows = entering(model, head.layer, input_ids=ids)[0]
        ours = torch.empty_like(own)
        head.logits(rows, ours)
    except RuntimeError:
        return False
    limit = 1e-4 * float(own.abs().max().clamp(min=1.0))
    return float((own - ours).abs().max()) <= limit


@contextmanager
def _instead_of(layer: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Until the end, `forward` is called in place of the layer's own."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
