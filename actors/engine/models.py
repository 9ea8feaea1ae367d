"""Loading a causal LM for a worker: safetensors only, no remote code, checked by the engine's self-test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.engine import check_full_attention, self_test
from common.failing import brief
from common.pretrained import ModelError


def load_model(folder: Path, *, dtype: str, device: str, vocab_size: int) -> PreTrainedModel:
    """A model in eval mode on its device.

    Raises:
        UnsupportedModelError: a layer without full attention, or the engine and the model's own forward disagree.
        ModelError: no safetensors weights in the folder, or none that fit its config.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # the code of a model may raise anything over a config that it did not expect
        raise ModelError(f"{folder}: cannot be loaded ({brief(error)})") from error
    check_full_attention(model.config)
    model = model.to(device).eval().requires_grad_(False)
    self_test(model, vocab_size=vocab_size)
    loaded: PreTrainedModel = model
    return loaded
