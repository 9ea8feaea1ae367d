"""The frozen base of a model in a worker: adapters are merged into it, each anew."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.adapters import Adapter, check_base, merged


class Base:
    """A model's own weights, as far as adapters change them: kept on its device, in its dtype, from the first one on.

    Every adapter is merged into these, never into a former result: roundings do not add up, and a worker that began
    late has the same weights as the others. digest: of the weights in the model's folder; None: it takes no adapters.
    """

    def __init__(self, model: PreTrainedModel, digest: str | None) -> None:
        self._model, self._digest = model, digest
        self._kept: dict[str, Tensor] = {}

    def check(self, adapter: Adapter) -> None:
        """Raises ValueError unless the adapter was trained on this base."""
        check_base(adapter, self._digest)

    def replaced(self) -> None:
        """All weights were loaded: the model is no base any more."""
        self._digest, self._kept = None, {}

    @torch.no_grad()
    def merge(self, adapter: Adapter) -> None:
        """Give the model, in place, the weights of its base with this adapter. Raises ValueError where it does not fit;
        nothing has changed then."""
        self.check(adapter)
        own: dict[str, Tensor] = self._model.state_dict()
        for name, (left, right) in adapter.factors.items():
            if name not in own:
                raise ValueError(f"an adapter for {name}, which the model does not have")
            if (len(left), right.shape[1]) != tuple(own[name].shape):
                raise ValueError(f"{name}: an adapter [{len(left)}, {right.shape[1]}] for {[*own[name].shape]}")
        for name in adapter.factors.keys() - self._kept.keys():
            self._kept[name] = own[name].clone()
        for name, base in self._kept.items():
            factors = adapter.factors.get(name)
            own[name].copy_(base if factors is None else merged(base, *factors, adapter.scaling))
