"""A model's layers, compiled, or computed again in the backward pass in place of keeping their activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from common.pretrained import ModelError


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only what enters each layer; the rest is computed again in the backward pass.

    transformers' own switch acts in training mode alone, where a model's dropout is on, so each layer's forward is
    wrapped here. Raises ModelError for a model without such layers.
    """
    for layer in _layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: nn.Module) -> None:
    """Compile the forward of each layer by `torch.compile`, for any number and length of rows; layers of one kind share
    what is compiled, which happens when they are first used. Raises ModelError for a model without such layers."""
    for layer in _layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _layers(model: nn.Module) -> list[Any]:
    """The layers that transformers can compute again."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that transformers can compute again: "
            "learner.gradient_checkpointing and learner.compile must be false for it"
        )
    return found
