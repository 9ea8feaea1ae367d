"""A half-precision head's logits are those of its weights and of what enters it, to float32.

A model's body gives other hidden states for other shapes, so what enters the head is caught and multiplied again in
float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.engine import head
from actors.engine.decode import ClosedChunk, Decoder
from actors.engine.head import Float32Head, widen_head
from actors.engine.score import Scorer
from actors.engine.scored import ScoreRequest
from actors.engine.slots import SlotModel
from common.divergence import coarse_reverse_kl

VOCAB = 600  # at 512 numbers a piece, the head is multiplied in 38 pieces, the last a shorter one
STOPS = (3, 7)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FULL = ["full_attention"] * 2
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "gemma, tied": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=8)),
    "gemma2, capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, layer_types=FULL, final_logit_softcapping=5.0)
    ),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "phi, bias": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}
BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "gemma2, capped": lambda x: 5 * (x / 5).tanh(),
    "granite, scaled": lambda x: x / 3,
    "cohere, scaled": lambda x: x * 0.3,
}


def make(family: str, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    head_of(model).weight.data *= 4  # logits far beyond what 8 bits tell apart
    return model.to(dtype).train(False).requires_grad_(False)


def head_of(model: Any) -> Any:
    return model.get_output_embeddings()


def entering(model: Any) -> list[Tensor]:
    """What enters the head, forward by forward, from now on."""
    seen: list[Tensor] = []
    head_of(model).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    return seen


def in_float64(model: Any, family: str, hidden: Tensor) -> Tensor:
    layer = head_of(model)
    x = hidden.double() @ layer.weight.double().T
    if layer.bias is not None:
        x = x + layer.bias.double()
    return BEHIND.get(family, lambda x: x)(x)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_PIECE", 512)


def exact(got: Tensor, expected: Tensor) -> None:
    """To float32: bfloat16 would be off by 4e-3 of a logit."""
    assert got.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_exact_for_what_enters_the_head(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    widen_head(model)
    seen = entering(model)
    ids = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        exact(logits, in_float64(model, family, seen[0]))
    assert seen[0].dtype == dtype and logits.shape == (2, 10, VOCAB)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "gemma2" not in name])  # which has no sdpa attention
def test_through_slots_and_after_a_swap(family: str) -> None:
    model, other = make(family), make(family, seed=1)
    names = list(model.state_dict())
    slots = SlotModel(model, slots=3, capacity=16)
    seen = entering(model)
    tokens, none, lengths = np.arange(24).reshape(3, 8), np.zeros(3, np.int64), np.array([8, 5, 8])
    for place in range(2):
        logits = slots.forward(None, tokens, none, lengths, [3, 4])
        exact(logits, in_float64(model, family, seen[place]))
        slots.load(other.state_dict())
        assert torch.equal(head_of(model).weight, head_of(other).weight)
    assert not torch.equal(seen[0], seen[1])
    assert list(model.state_dict()) == names
    assert slots.forward(None, tokens, none, lengths, []).shape == (3, 0, VOCAB)


def test_a_tied_head_stays_tied() -> None:
    model = make("gemma, tied")
    SlotModel(model, slots=1, capacity=8)
    assert head_of(model).weight is model.get_input_embeddings().weight
    again = copy.deepcopy(model)
    assert isinstance(head_of(again), Float32Head)
    assert head_of(again).weight is again.get_input_embeddings().weight is not head_of(model).weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_weights_change_nothing(dtype: torch.dtype) -> None:
    model = make("qwen3", dtype)
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    widen_head(model)
    assert type(head_of(model)) is nn.Linear
    assert torch.equal(model(input_ids=ids).logits, before)


class Own(nn.Linear):
    """A head that computes in a way of its own."""


def test_a_head_that_is_no_plain_linear_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make("qwen3")
    head_of(model).__class__ = Own
    widen_head(model)
    assert type(head_of(model)) is Own
    assert "Qwen3ForCausalLM: its head is Own, not nn.Linear" in caplog.text
    caplog.clear()
    head_of(model).__class__ = nn.Linear
    for _ in range(2):  # the self-test's slots, then a worker's
        widen_head(model)
    assert type(head_of(model)) is Float32Head and not caplog.text


def test_torch_is_asked_once_for_a_product_with_a_wide_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where it has one: asked for by its dtype, on the weight as it is."""
    multiply, asked = torch.mm, []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append((a.dtype, b.dtype, tuple(b.shape)))
        return multiply(a.to(out_dtype), b.to(out_dtype))

    head._tried_once.cache_clear()
    try:
        assert not head._multiplies_into_float32(torch.device("cpu"), torch.bfloat16)
        head._tried_once.cache_clear()
        monkeypatch.setattr(torch, "mm", mm)
        model = make("phi, bias")
        widen_head(model)
        seen = entering(model)
        for _ in range(2):
            logits = model(input_ids=torch.arange(6)[None], use_cache=False).logits
        exact(logits, in_float64(model, "phi, bias", seen[0]))
        half = torch.bfloat16
        assert asked == [(half, half, (8, 8)), (half, half, (32, VOCAB)), (half, half, (32, VOCAB))]
    finally:
        head._tried_once.cache_clear()


# --- divergences ---


def written(model: Any, *, alone: bool, slots: int) -> list[ClosedChunk]:
    """Rollouts of a few prompts, in chunks of one token where they are written alone."""
    decoder = Decoder(
        model,
        slots=slots,
        max_length=64,
        stop_ids=STOPS,
        vocab_size=VOCAB,
        teacher_top_k=16,
        chunk_tokens=1 if alone else 6,
        prefill_tokens=32,
        alone=alone,
    )
    waiting = list(range(3))
    chunks: list[ClosedChunk] = []
    while waiting or decoder.busy:
        while waiting and decoder.free:
            n = waiting.pop()
            decoder.add(str(n), prompt_of(n), seed=n, max_new_tokens=24)
        chunks += decoder.step()
    return chunks


def prompt_of(n: int) -> NDArray[np.int32]:
    return np.random.default_rng(n).integers(8, VOCAB, 5 + n).astype(np.int32)


def divergences(student: Any, teacher: Any, *, alone: bool) -> NDArray[np.float64]:
    """d_t in nats of every token, by the writer's record and the scorer's answer."""
    slots = 1 if alone else 3
    scorer = Scorer(teacher, slots=slots, max_length=64, stop_ids=STOPS, vocab_size=VOCAB, prefill_tokens=32)
    texts: dict[str, list[int]] = {}
    found = []
    for chunk in written(student, alone=alone, slots=slots):
        text = texts.setdefault(chunk.key, [])
        prefix = np.array(text, dtype=np.int32)
        request = ScoreRequest(
            chunk.key, prompt_of(int(chunk.key)), chunk.start, chunk.tokens, chunk.support_ids, prefix=prefix
        )
        (scored,) = scorer.score([request])
        text += chunk.tokens.tolist()
        assert chunk.tail_logprobs is not None and scored.tail_logprobs is not None
        found.append(
            coarse_reverse_kl(
                chunk.support_logprobs, scored.teacher_logprobs, chunk.tail_logprobs, scored.tail_logprobs
            )
        )
    return np.concatenate(found)


def equal_pair() -> tuple[Any, Any]:
    """The same distribution by other logits: the teacher's are 3.75 above the student's, near 20 as a large model's."""
    student = make("phi, bias")
    student.lm_head.bias.fill_(20.0)
    teacher = copy.deepcopy(student)
    teacher.lm_head.bias.fill_(23.75)
    return student, teacher


def test_equal_distributions_are_no_nats_apart() -> None:
    """One token at a time both bodies see the same shapes: what remains is the head's."""
    student, teacher = equal_pair()
    assert divergences(student, teacher, alone=True).max() < 1e-9


def test_rounded_logits_would_be_as_far_apart_as_a_trap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.slots.widen_head", lambda model: None)
    student, teacher = equal_pair()
    assert divergences(student, teacher, alone=True).mean() > 1e-4


def test_chunks_of_other_shapes_than_steps_add_what_the_body_adds() -> None:
    """The scorer takes several tokens in one forward: its hidden states may round otherwise, whatever the head does."""
    student, teacher = equal_pair()
    apart = divergences(student, teacher, alone=False)
    same = divergences(student, student, alone=False)
    np.testing.assert_allclose(apart, same, atol=1e-9)  # no more than the body's, which is the same in both
