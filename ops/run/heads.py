"""Whether the learner can make a model's logits a few rows at a time, told before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.failing import brief

TESTED = frozenset(
    ("cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "phi", "qwen2", "qwen3")
)
"""Model types whose heads are known to be of a kind that the learner computes in pieces: torch need not be loaded."""


def whole_logits(folder: Path, model_type: str) -> str:
    """Why the learner will hold the logits of a whole micro-batch; '' if it will not. A model of an untested type is
    built without memory, and numbers are sent through what its forward does after the head."""
    if model_type in TESTED:
        return ""
    from learner.head import WHOLE, linear_head

    try:
        model = without_weights(folder)
        _skip_trunk(model)
        head = linear_head(model, model.get_output_embeddings())
    except Exception as error:  # the code of a model may raise anything
        return f"its output head cannot be examined before it is loaded ({brief(error)}); the learner does that"
    return "" if head is not None else WHOLE


class _Output(tuple[Any, ...]):
    """What a trunk returns, of whichever kind: its states and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def without_weights(folder: Path) -> Any:
    """The layers of a model, on torch's device `meta`. Raises whatever its code raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return make(config, trust_remote_code=False)


def _skip_trunk(model: Any) -> None:
    """Let the trunk of a model on the meta device answer at once: some look at numbers, and there are none."""
    import torch

    width = model.get_output_embeddings().weight.shape[1]
    if model.base_model is not model:
        states = torch.empty(1, 3, width, device="meta")
        model.base_model.forward = lambda *_, **__: _Output((states,))
