"""A model in two parts has the model's own logits, for some rows as for all, and a teacher never holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.engine import outcomes
from actors.engine.apart import Apart
from actors.engine.score import Scorer
from actors.engine.scored import ScoreRequest

VOCAB = 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
FULL = ["full_attention"] * 2
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=8, layer_types=FULL, final_logit_softcapping=5.0)
    ),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().train(False)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_rows_have_the_logits_of_the_whole_forward(family: str) -> None:
    model = make(family)
    apart = Apart(model)
    assert apart.possible
    ids = torch.arange(40).view(2, 20) % VOCAB
    trunk = model.base_model
    with torch.inference_mode():
        with apart.seen() as seen:
            whole = model(input_ids=ids, use_cache=False).logits
        rows = torch.tensor([3, 21, 39])
        got = apart.logits(seen[0].flatten(0, 1)[rows])
        torch.testing.assert_close(got, whole.flatten(0, 1)[rows])
        assert model.base_model is trunk
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)  # as before


class Reader(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    """Its logits depend on the text beside the trunk's states."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids.float().mean()
        return output


class Nameless(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    base_model_prefix = "trunk"


@pytest.mark.parametrize("kind", [Reader, Nameless])
def test_a_model_that_does_not_come_apart_is_scored_whole(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    odd = kind(Qwen3Config(**SHAPE, head_dim=8)).train(False).requires_grad_(False)
    apart = Apart(odd)
    assert not apart.possible
    assert caplog.messages == [f"{kind.__name__}: its logits are made whole, not a few rows at a time"]
    if kind is Nameless:  # its numbers are those of the class that it is made of
        (got,), (expected,) = (scorer(model).score([request(7)]) for model in (odd, make("qwen3")))
        np.testing.assert_allclose(got.teacher_logprobs, expected.teacher_logprobs, rtol=1e-5)


def scorer(model: Any, vocab: int = VOCAB, **settings: Any) -> Scorer:
    usual = {"slots": 8, "max_length": 80, "prefill_tokens": 8 * 80}
    return Scorer(model, stop_ids=(3, 7), vocab_size=vocab, **usual | settings)


def request(n: int, key: str = "r", vocab: int = VOCAB) -> ScoreRequest:
    rng = np.random.default_rng(n)
    return ScoreRequest(
        key=key,
        prompt=np.array([1, 2], np.int32),
        start=0,
        tokens=rng.integers(0, vocab, n).astype(np.int32),
        support_ids=np.tile(np.arange(10, 14, dtype=np.int32), (n, 1)),
    )


def test_pieces_change_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen3")
    asked = [request(n, str(n)) for n in (50, 7, 31, 1)]
    whole = scorer(model).score(asked)
    for module in ("actors.engine.score", "actors.engine.decode"):
        monkeypatch.setattr(f"{module}.PIECE_ROWS", 4)
    for one, other in zip(scorer(model).score(asked), whole, strict=True):
        np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, rtol=1e-5)
        np.testing.assert_allclose(one.sampled, other.sampled, rtol=1e-5)
        assert one.tail_logprobs is not None and other.tail_logprobs is not None
        np.testing.assert_allclose(one.tail_logprobs, other.tail_logprobs, rtol=1e-5)


@pytest.mark.parametrize("own", [0, 16])
def test_a_teacher_never_holds_a_tenth_of_the_logits(own: int) -> None:
    rows, tokens, vocab = 64, 64, 5000
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": vocab}
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | small, head_dim=2)).train(False).requires_grad_(False)
    engine = scorer(model, vocab, slots=rows, prefill_tokens=rows * tokens, teacher_support=own)
    asked = [request(tokens, str(row), vocab) for row in range(rows)]
    engine.score(asked[:1])  # the cache has its place now
    assert peak_bytes(lambda: engine.score(asked)) < 0.1 * 4 * rows * tokens * vocab


def test_supports_are_taken_without_another_matrix() -> None:
    """One is needed for the sum of exponentials, inside that operation."""
    logits, ids = torch.randn(64, 5000), torch.arange(10, 18).expand(64, 8)
    for take in (
        lambda log_probs: outcomes.student_support(log_probs, 3, 8, stop_count=2),
        lambda log_probs: outcomes.on_support(log_probs, ids, 3, stop_count=2),
    ):
        log_probs = outcomes.log_outcomes(logits, [3, 7], 5000)
        assert peak_bytes(lambda: take(log_probs)) < 1.2 * log_probs.nbytes  # noqa: B023
    # As `on_support` has left it.
    assert peak_bytes(lambda: outcomes.beside_support(log_probs, 16, 4990)) < 1.2 * log_probs.nbytes
