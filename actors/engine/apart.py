"""A causal language model in two parts: its trunk, and what its own forward makes of the trunk's states.

Logits are by far the largest tensor of a forward with many rows. With the two apart, states come first, and their
logits a few rows at a time. The second part is the model's own code with the trunk left out, so that whatever it does
around the head (a bias, a scale, a cap) is done.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger("katana.engine")


class _Given(nn.Module):
    """Stands in for a trunk, and has its output already."""

    def __init__(self, trunk: nn.Module, output: Any) -> None:
        super().__init__()
        self._of = (trunk, output)  # in a tuple: not a module of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._of[1]

    def __getattr__(self, name: str) -> Any:
        """What else the model's forward reads of its trunk, such as the number that scales its logits."""
        return getattr(self.__dict__["_of"][0], name)


class Apart:
    """The two parts of `model`, without gradients.

    `possible` is False, with a warning, where they do not give what the model gives: one whose trunk has no name of its
    own, or whose forward reads more of the trunk than its states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._name = model.base_model_prefix
        self._form: Any = None  # of the trunk's output, as the model's forward expects it
        self.possible = isinstance(model._modules.get(self._name), nn.Module) and self._agrees()
        if not self.possible:
            log.warning("%s: its logits are made whole, not a few rows at a time", type(model).__name__)

    @contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """The trunk's last states [b, T, H] of each forward of the model until the end."""
        states: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            states.append(output.last_hidden_state)
            if self._form is None:
                self._form = copy.copy(output)
                self._form.last_hidden_state = None

        trunk: Any = self._model._modules[self._name]
        hook = trunk.register_forward_hook(keep)
        try:
            yield states
        finally:
            hook.remove()

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, W] of states [n, H]: the model's forward, with these in place of its trunk's."""
        given = copy.copy(self._form)
        given.last_hidden_state = states[None]
        modules: Any = self._model._modules
        trunk = modules[self._name]
        modules[self._name] = _Given(trunk, given)
        try:
            ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            modules[self._name] = trunk
        return logits

    @torch.inference_mode()
    def _agrees(self) -> bool:
        """Whether a short text has the same logits in two parts."""
        ids = torch.arange(3, device=self._model.device)[None]
        try:
            with self.seen() as seen:
                whole = self._model(input_ids=ids, use_cache=False).logits[0]
            parts = self.logits(seen[0][0])
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            return False
        limit = 1e-3 if self._model.dtype in (torch.float32, torch.float64) else 5e-2
        scale = float(whole.abs().max().clamp(min=1.0))
        return parts.shape == whole.shape and float((parts - whole).abs().max()) <= limit * scale
