"""Loading a causal LM for a worker: safetensors only, no remote code, checked by the engine's self-test."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.engine.attention import UnsupportedModelError, check_attention
from actors.engine.proof import self_test
from actors.placing import device_here
from common.failing import brief, out_of_memory
from common.pretrained import ModelError, attention_of, read_model_config


def load_model(
    folder: Path, *, dtype: str, device: str, vocab_size: int, device_map: str | None = None
) -> PreTrainedModel:
    """A model in eval mode on its device, or spread over several by a `device_map` of transformers.

    A quantised model (one with a `quantization_config`, such as bitsandbytes, GPTQ, AWQ) is put on the device as it is
    loaded: it cannot be moved later.

    Raises:
        UnsupportedModelError: a layer that slots do not have, or the engine and the model's own forward disagree.
        ModelError: no safetensors weights in the folder, none that fit its config, or a package is missing.
    """
    placed: Any = device_map
    if placed is None and "quantization_config" in read_model_config(folder):
        placed = {"": device_here(device)}
    if placed is not None and find_spec("accelerate") is None:
        why = "teacher.device_map needs" if device_map else f"{folder} is quantised: it needs"
        raise ModelError(f"{why} the package accelerate: pip install accelerate")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            attn_implementation=attention_of(folder),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **({} if placed is None else {"device_map": placed}),
        )
    except Exception as error:  # the code of a model may raise anything over a config that it did not expect
        raise ModelError(f"{folder}: cannot be loaded ({brief(error)})") from error
    check_attention(model.config)
    if placed is None:
        model = model.to(device_here(device))
    model = model.eval().requires_grad_(False)
    try:
        self_test(model, vocab_size=vocab_size)
    except Exception as error:
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        # For example of a model that does not take a mask for each type of layer.
        raise UnsupportedModelError(f"{folder}: its forward fails in slots ({brief(error)})") from error
    loaded: PreTrainedModel = model
    return loaded
