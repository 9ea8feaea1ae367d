"""The outcomes that a scorer adds to the student's support, against a plain forward in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engine import Scorer, ScoreRequest, score
from common.divergence import coarse_reverse_kl

VOCAB, WIDTH, STOPS, TOP_K = 19, 24, (3, 7, 11), 4
LEFT = VOCAB - len(STOPS) - TOP_K  # outcomes outside STOP and support
OWN = [1, 3, LEFT - 1, LEFT, LEFT + 5]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": WIDTH, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **ids, initializer_range=0.5)).eval()


def scorer(model: Any, **changes: Any) -> Scorer:
    settings: dict[str, Any] = {"slots": 3, "max_length": 48, "stop_ids": STOPS, "vocab_size": VOCAB}
    return Scorer(model, **settings | {"prefill_tokens": 64} | changes)


def requests() -> list[ScoreRequest]:
    """Two rollouts, one in two chunks; the support is no model's likeliest."""
    rng = np.random.default_rng(0)
    allowed = [v for v in range(VOCAB) if v not in STOPS]
    made = []
    for key, chunks in (("a", [5, 6]), ("b", [9])):
        tokens = rng.integers(0, VOCAB, sum(chunks)).astype(np.int32)
        support = np.stack([rng.permutation(allowed)[:TOP_K] for _ in tokens]).astype(np.int32)
        prompt, start = rng.integers(0, VOCAB, 4).astype(np.int32), 0
        for size in chunks:
            part = slice(start, start + size)
            made.append(ScoreRequest(key, prompt, start, tokens[part], support[part]))
            start += size
    return made


def log_q(model: Any, asked: list[ScoreRequest], key: str) -> Any:
    """Of every id after each place of a rollout's text, float64 [n, VOCAB]."""
    chunks = [one for one in asked if one.key == key]
    text = np.concatenate([chunks[0].prompt, *(one.tokens for one in chunks)])
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(text)[None].long()).logits[0]
    return logits[len(chunks[0].prompt) - 1 : -1, :VOCAB].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("own", OWN)
def test_they_are_the_likeliest_outside_stop_and_support(model: Any, own: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(score, "PIECE_ROWS", 7)  # several pieces in a forward
    asked = requests()
    plain, found = scorer(model).score(asked), scorer(model, teacher_support=own).score(asked)
    for request, before, answer in zip(asked, plain, found, strict=True):
        np.testing.assert_array_equal(answer.teacher_logprobs, before.teacher_logprobs)
        np.testing.assert_array_equal(answer.sampled, before.sampled)
        assert answer.tail_logprobs is not None and before.tail_logprobs is not None and before.own is None
        np.testing.assert_array_equal(answer.tail_logprobs, before.tail_logprobs)
        added = answer.own
        assert added is not None and added.ids.dtype == np.int32
        assert added.ids.shape == (len(request.tokens), min(own, LEFT))
        rows = log_q(model, asked, request.key)[request.start :]
        for place, row in enumerate(rows[: len(request.tokens)]):
            outside = [v for v in range(VOCAB) if v not in STOPS and v not in request.support_ids[place]]
            expected = sorted(outside, key=lambda v: -row[v])
            assert added.ids[place].tolist() == expected[: min(own, LEFT)]
            np.testing.assert_allclose(added.logprobs[place], row[added.ids[place]], atol=1e-4)
            if own < LEFT:
                assert added.tail_logprobs is not None
                left = np.log(np.exp(row[expected[own:]]).sum())
                assert added.tail_logprobs[place] == pytest.approx(left, abs=1e-4)
        assert (added.tail_logprobs is None) == (own >= LEFT)


def test_nothing_is_added_to_a_support_that_is_everything(model: Any) -> None:
    everything = np.array([[v for v in range(VOCAB) if v not in STOPS]], np.int32)
    asked = ScoreRequest("a", np.array([1, 2], np.int32), 0, np.array([4], np.int32), everything)
    (answer,) = scorer(model, teacher_support=3).score([asked])
    assert answer.own is None and answer.tail_logprobs is None


def test_the_divergence_of_the_wider_support_is_never_the_smaller_one(model: Any) -> None:
    """Outcomes put together can only hide a difference: so a loss on the wider support sees more."""
    asked = requests()
    seen = []
    for own in (0, 2, LEFT):
        total = 0.0
        for request, answer in zip(asked, scorer(model, teacher_support=own).score(asked), strict=True):
            ids, log_t, tail = request.support_ids, answer.teacher_logprobs, answer.tail_logprobs
            if answer.own is not None:
                ids = np.concatenate([ids, answer.own.ids], axis=1)
                log_t = np.concatenate([log_t, answer.own.logprobs], axis=1)
                tail = answer.own.tail_logprobs
            flat = np.full(len(ids), -np.log(VOCAB), np.float32)  # a student to whom all ids are alike
            log_p = np.repeat(flat[:, None], ids.shape[1] + 1, axis=1)
            log_p[:, 0] += np.log(len(STOPS), dtype=np.float32)
            rest = VOCAB - len(STOPS) - ids.shape[1]
            total += coarse_reverse_kl(log_p, log_t, None if not rest else flat + np.float32(np.log(rest)), tail).sum()
        seen.append(total)
    assert seen[0] < seen[1] < seen[2]
