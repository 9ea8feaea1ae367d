"""Sliding-window layers in slots: rows at positions of their own, beyond the window, against plain forwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from actors.engine import attention
from actors.engine.attention import FULL, ONE_QUERY, SLIDING, Masks, UnsupportedModelError, short_window
from actors.engine.models import load_model
from actors.engine.proof import self_test
from actors.engine.slots import SlotModel
from common.pretrained import _WITHOUT_SDPA, attention_of
from tests.actors.engine.test_engine import (
    SHAPE,
    VOCAB,
    Written,
    assert_written,
    check,
    collect,
    decoder,
    prompt_of,
    qwen3,
    ready,
    request,
    scorer,
)

WINDOW = 6
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": WINDOW, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": WINDOW}


def made(model_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    return ready(model_class(config))


def gpt_oss(**changes: Any) -> PreTrainedModel:
    config = GptOssConfig(**SHAPE | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes)
    return made(GptOssForCausalLM, config)


def gemma2(**changes: Any) -> PreTrainedModel:
    """Scores and logits are capped."""
    return made(Gemma2ForCausalLM, Gemma2Config(**SHAPE | MIXED | {"attn_logit_softcapping": 2.0} | changes))


def gemma3(**changes: Any) -> PreTrainedModel:
    return made(Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE | MIXED | changes))


def mistral(**changes: Any) -> PreTrainedModel:
    """The window is on all layers, and their types have no names."""
    return made(MistralForCausalLM, MistralConfig(**SHAPE | {"sliding_window": WINDOW} | changes))


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    experts = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "use_sliding_window": True, "head_dim": 8}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE | experts | changes))


def qwen3_moe_full() -> PreTrainedModel:
    return qwen3_moe(use_sliding_window=False)


def mixtral(**changes: Any) -> PreTrainedModel:
    return made(MixtralForCausalLM, MixtralConfig(**SHAPE | EXPERTS | {"num_local_experts": 4} | changes))


def qwen3_mixed(**changes: Any) -> PreTrainedModel:
    return made(Qwen3ForCausalLM, Qwen3Config(**SHAPE | MIXED | {"use_sliding_window": True} | changes))


def phi3(**changes: Any) -> PreTrainedModel:
    return made(Phi3ForCausalLM, Phi3Config(**SHAPE | {"sliding_window": WINDOW} | changes))


def cohere2(**changes: Any) -> PreTrainedModel:
    return made(Cohere2ForCausalLM, Cohere2Config(**SHAPE | MIXED | changes))


Maker = Callable[..., PreTrainedModel]
SLIDERS: list[Maker] = [gemma2, gemma3, gpt_oss, mistral, mixtral, qwen3_moe, qwen3_mixed, phi3, cohere2]
MODELS: list[Maker] = [*SLIDERS, qwen3_moe_full]


@pytest.mark.parametrize("make", MODELS)
def test_rollouts_beyond_the_window_equal_plain_forwards(make: Maker) -> None:
    """Rows at different positions, prompts that are forwarded in pieces of less than the window and more, slots that
    were used before."""
    model = make()
    engine = decoder(model, prefill_tokens=9)
    prompts = {f"r{n}": prompt_of(n) for n in (1, 17, 4, 28, 9)}
    waiting = list(prompts)
    written: Written = {}
    while waiting or engine.busy:
        while waiting and engine.free:
            key = waiting.pop(0)
            engine.add(key, prompts[key], seed=len(key) + 5, max_new_tokens=20)
        collect(written, engine.step())
    for key, prompt in prompts.items():
        assert_written(model, prompt, len(key) + 5, written[key])
    assert max(len(prompts[key]) + sum(len(c.tokens) for c in written[key]) for key in prompts) > 4 * WINDOW


@pytest.mark.parametrize("make", MODELS)
def test_chunks_beyond_the_window_are_scored_as_by_a_plain_forward(make: Maker) -> None:
    model = make()
    engine = scorer(model, prefill_tokens=9)
    check(model, engine, [request("a", 0, 4), request("b", 0, 13)])
    check(model, engine, [request("b", 13, 15), request("a", 4, 30)])
    check(model, engine, [request("c", 22, 30, prefix=True), request("b", 15, 16)])


def far_logits(model: Any) -> Tensor:
    ids = torch.from_numpy(prompt_of(30).astype(np.int64))[None]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits


@pytest.mark.parametrize("make", SLIDERS)
def test_the_window_makes_a_difference(make: Maker) -> None:
    """Or the tests above would pass without one."""
    near, far = far_logits(make()), far_logits(make(sliding_window=100))
    assert float((near - far).abs().max()) > 1e-2 * float(far.abs().max())


@pytest.mark.parametrize("make", MODELS)
def test_the_self_test_passes_in_every_dtype(make: Maker) -> None:
    assert self_test(make(), vocab_size=VOCAB) < 1e-4
    half: Any = make()
    assert self_test(half.to(torch.bfloat16), vocab_size=VOCAB) < 5e-2


@pytest.mark.parametrize("make", SLIDERS)
@pytest.mark.parametrize("off", [-1, 1, 1000])
def test_the_self_test_sees_a_wrong_window_however_long_the_real_one_is(
    make: Maker, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(sliding_window=4096)
    assert self_test(model, vocab_size=VOCAB) < 1e-4

    class Wrong(Masks):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._window += off

    monkeypatch.setattr("actors.engine.slots.Masks", Wrong)
    with pytest.raises(UnsupportedModelError, match="differ from a plain forward"):
        self_test(model, vocab_size=VOCAB)


def test_a_self_test_leaves_the_window_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma3(sliding_window=4096)
    before = far_logits(model)
    self_test(model, vocab_size=VOCAB)
    assert model.config.sliding_window == 4096
    assert torch.equal(far_logits(model), before)
    with pytest.raises(ZeroDivisionError), short_window(model, 8):
        assert model.config.sliding_window == 8
        raise ZeroDivisionError
    assert model.config.sliding_window == 4096
    small = gemma3(sliding_window=3)
    with short_window(small, 8):
        assert small.config.sliding_window == 3


def test_a_running_engine_keeps_its_window_through_a_self_test() -> None:
    """A worker proves its engine between two steps."""
    model = gemma3(sliding_window=12)
    engine = decoder(model, prefill_tokens=9)
    engine.add("r", prompt_of(20), seed=5, max_new_tokens=20)
    written: Written = {}
    collect(written, engine.step())
    engine.prove()
    for _ in range(10):
        collect(written, engine.step())
    engine.prove()
    while engine.busy:
        collect(written, engine.step())
    assert_written(model, prompt_of(20), 5, written["r"])


def test_masks_by_hand() -> None:
    model = gemma3(sliding_window=2)
    masks = Masks(model, "sdpa").at(torch.tensor([[0, 3], [2, 0]]), torch.arange(4))
    assert isinstance(masks, dict)
    full = [[[1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 0, 0, 0]]]
    near = [[[1, 0, 0, 0], [0, 0, 1, 1]], [[0, 1, 1, 0], [1, 0, 0, 0]]]
    assert masks[FULL][:, 0].int().tolist() == full
    assert masks[SLIDING][:, 0].int().tolist() == near
    one = Masks(mistral(sliding_window=2), "eager").at(torch.tensor([[0, 3], [2, 0]]), torch.arange(4))
    assert isinstance(one, Tensor)
    assert (one[:, 0] == 0).int().tolist() == near
    assert set(one.flatten().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_a_model_without_sdpa_runs_eagerly_and_others_do_not() -> None:
    for make in MODELS:
        model = make()
        SlotModel(model, slots=1, capacity=8)
        assert model.config._attn_implementation == ("eager" if make in (gemma2, gpt_oss) else ONE_QUERY)
    eager: Any = qwen3()
    eager.set_attn_implementation("eager")
    SlotModel(eager, slots=1, capacity=8)
    assert eager.config._attn_implementation == ONE_QUERY


@pytest.mark.parametrize("family", sorted(_WITHOUT_SDPA))
def test_a_family_that_is_loaded_eagerly_has_no_sdpa_and_runs_in_slots(family: str, tmp_path: Path) -> None:
    known: Any = AutoConfig.for_model(family)
    experts = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shape = {key: value for key, value in (SHAPE | experts | {"head_dim": 8}).items() if hasattr(known, key)}
    windows = MIXED if hasattr(known, "layer_types") else {}
    torch.manual_seed(0)
    model: Any = ready(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape | windows)))
    assert not model._supports_sdpa
    model.save_pretrained(tmp_path)
    assert attention_of(tmp_path) == "eager"
    loaded = load_model(tmp_path, dtype="float32", device="cpu", vocab_size=VOCAB)
    assert loaded.config._attn_implementation == "eager"


def test_a_saved_model_is_loaded_by_worker_and_learner(tmp_path: Path) -> None:
    from learner.student import load_trainable

    for make in (gpt_oss, gemma3):
        folder = tmp_path / make.__name__
        model: Any = make()
        model.save_pretrained(folder)
        loaded = load_model(folder, dtype="float32", device="cpu", vocab_size=VOCAB)
        expected = far_logits(model)
        torch.testing.assert_close(far_logits(loaded), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(far_logits(load_trainable(folder, "cpu")), expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_code_fails_in_slots_is_refused_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = gemma3()
    model.save_pretrained(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'dict' object has no attribute 'ndim'")

    monkeypatch.setattr(Gemma3ForCausalLM, "forward", fail)
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path}: its forward fails in slots .*'dict' object"):
        load_model(tmp_path, dtype="float32", device="cpu", vocab_size=VOCAB)


def test_a_self_test_that_runs_out_of_memory_says_nothing_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = gemma3()
    model.save_pretrained(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Gemma3ForCausalLM, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_model(tmp_path, dtype="float32", device="cpu", vocab_size=VOCAB)


def test_the_names_of_layers_are_those_of_transformers() -> None:
    assert attention.layer_kinds(qwen3_mixed().config) == {FULL, SLIDING}
    assert attention.layer_kinds(mistral().config) == {SLIDING}
    assert attention.layer_kinds(mistral(sliding_window=None).config) == {FULL}
    assert attention.layer_kinds(qwen3_moe_full().config) == {FULL}
