"""The learner with sliding-window models: what a micro-batch's kept tokens see, and where their gradients go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from common.config import Loss
from learner.batch import MicroBatch, micro_batches
from learner.head import keep_head_in_float32, output_head
from learner.loss import StudentOutcomes, token_losses
from learner.pieces import backward_in_pieces
from tests.learner.trajectories import STOPS, VOCAB, WIDTH, random_batch

WINDOW = 4
SIZES = [(2, 9), (11, 5), (3, 20)]
SHAPE: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "sliding_window": WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE | MIXED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | MIXED)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SHAPE | MIXED | EXPERTS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE)),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    keep_head_in_float32(model)
    return model


def gradients(model: Any, micros: Sequence[MicroBatch]) -> dict[str, Tensor]:
    def losses(student: StudentOutcomes, micro: MicroBatch) -> Tensor:
        return token_losses(Loss(), student, micro)

    model.zero_grad()
    head = output_head(model)
    for micro in micros:
        rows = head.kept_rows(model, micro)
        backward_in_pieces(head, rows, micro, losses, stop_ids=STOPS, vocab_size=VOCAB)
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_padded_rows_are_those_of_each_row_alone(name: str) -> None:
    model = tiny(name)
    batch = random_batch(2, SIZES)

    together = micro_batches(batch, max_tokens=1000)
    apart = micro_batches(batch, max_tokens=1)
    assert (len(together), len(apart)) == (1, 3)
    expected = gradients(model, apart)
    got = gradients(model, together)
    assert got.keys() == expected.keys()
    assert {name for name, _ in model.named_parameters()} == got.keys()
    for parameter in got:
        scale = float(expected[parameter].abs().max())
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


def test_no_gradient_reaches_a_token_that_the_windows_have_passed() -> None:
    """Two layers of a window of 4 see 1 + 2 x 3 tokens."""
    model = tiny("mistral")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (1, 16)))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits[0, -1].logsumexp(0).backward()
    reached = embedded.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [False] * 9 + [True] * 7
