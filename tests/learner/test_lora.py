"""LoRA: adapters in the learner, the same merged weights for everyone, `model/` and `adapter/`, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from actors.engine import Decoder
from actors.engine.loaded import sampler
from common.config import Config, ConfigError
from common.pretrained import PACKAGE_ROOT, ModelError, Pair, read_facts
from learner import checkpoint
from learner.head import LinearHead
from learner.lora import LoraStudent, inject, make_student, targets_of, weights_in
from learner.student import TrainableStudent, load_trainable

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])


def config_of(lora: dict[str, Any] | None = None, *, folder: Path = STUDENT, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "student": {"model": str(folder)},
        "teacher": {"model": str(PACKAGE_ROOT / "ops" / "models" / "teacher")},
        "data": {"max_prompt_length": 24},
        "rollout": {"max_completion_length": 40, "slots": 2, "dtype": changes.pop("rollout_dtype", "float32")},
        "termination": {"policy": "none"},
        "eval": {"slots": 2},
        "learner": {"lora": {"rank": 4} | (lora or {}), "dtype": changes.pop("dtype", "float32")},
    }
    return Config.model_validate(tree | changes)


def student_of(config: Config) -> LoraStudent:
    torch.manual_seed(0)
    found = make_student(Path(config.student.model), config)
    assert isinstance(found, LoraStudent)
    return found


def gradients(student: TrainableStudent, step: int, dtype: torch.dtype = torch.float32) -> float:
    ids = (IDS + step) % 30 + 2
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = student.model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def train(student: TrainableStudent, steps: range, dtype: torch.dtype = torch.float32) -> list[float]:
    losses = []
    for step in steps:
        losses.append(gradients(student, step, dtype))
        student.clip()
        student.step(1e-2)
    return losses


def decoder_of(config: Config, folder: Path = STUDENT) -> Decoder:
    facts = read_facts(folder)
    return sampler(
        config,
        Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size),
        folder,
        dtype=config.rollout.dtype,
        device="cpu",
        temperature=1.0,
        top_p=1.0,
    )


def published(student: TrainableStudent, dtype: torch.dtype = torch.float32) -> bytes:
    return save(student.weights(dtype), student.header)


def held_by(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in decoder._model.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_adapters_are_trained_and_the_first_version_is_the_base() -> None:
    config = config_of()
    student, decoder = student_of(config), decoder_of(config)
    trained = {name for name, one in student.model.named_parameters() if one.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {id(one) for group in student.optimizer.param_groups for one in group["params"]} == {
        id(one) for one in student.model.parameters() if one.requires_grad
    }
    before = held_by(decoder)
    decoder.swap(decoder.read_weights(published(student)))
    assert same(held_by(decoder), before)
    frozen = {name: one.clone() for name, one in student.model.named_parameters() if not one.requires_grad}
    losses = train(student, range(4))
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], one) for name, one in student.model.named_parameters() if name in frozen)


def test_merged_weights_are_the_same_bits_in_workers_and_in_the_model_at_the_end(tmp_path: Path) -> None:
    config = config_of()
    student, early, late = student_of(config), decoder_of(config), decoder_of(config)
    for steps in (range(2), range(2, 5)):
        train(student, steps)
        early.swap(early.read_weights(published(student)))
    late.swap(weights_in(student.capture(step=5, policy_version=5, consumed=[], counters={})))
    assert same(held_by(early), held_by(late)), "what was merged before adds up"
    student.write(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    found = held_by(late)
    assert saved.keys() <= found.keys() and all(torch.equal(saved[name], found[name]) for name in saved)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=IDS).logits, student.model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_peft_loads_the_adapter_and_merges_it_to_the_same_within_rounding(tmp_path: Path) -> None:
    student = student_of(config_of({"rank": 3, "alpha": 5}))
    train(student, range(3))
    student.write(tmp_path / "model")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 5, str(STUDENT))
    assert sorted(settings["target_modules"]) == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    logits = student.model(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)
    unchanged = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)(input_ids=IDS).logits
    assert float((logits - unchanged).detach().abs().max()) > 0.1, "nothing was learned: the comparison shows nothing"
    ours = load_file(tmp_path / "model" / "model.safetensors")
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_worker_in_bfloat16_merges_in_float32_and_rounds_once(tmp_path: Path) -> None:
    """The model's files hold what bfloat16 can hold, as those that people download do."""
    base = load_trainable(STUDENT, "cpu")
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "base" / name).write_bytes((STUDENT / name).read_bytes())
    config = config_of(folder=tmp_path / "base", rollout_dtype="bfloat16")
    student, decoder = student_of(config), decoder_of(config, tmp_path / "base")
    train(student, range(3))
    decoder.swap(decoder.read_weights(published(student, torch.bfloat16)))
    student.write(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    found = held_by(decoder)
    assert all(torch.equal(saved[name].to(torch.bfloat16), found[name]) for name in saved)


def test_an_adapter_of_another_base_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    config = config_of()
    student, decoder = student_of(config), decoder_of(config)
    train(student, range(2))
    other = load_trainable(STUDENT, "cpu")
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_bytes((STUDENT / "generation_config.json").read_bytes())
    stranger = decoder_of(config, tmp_path / "other")
    before = held_by(stranger)
    with pytest.raises(ValueError, match=r"an adapter for the base 8e6be2bfe8b3…, this worker holds [0-9a-f]{12}…: st"):
        stranger.read_weights(published(student))
    adapter = decoder.read_weights(published(student))
    with pytest.raises(ValueError, match="this worker holds"):
        stranger.swap(adapter)
    assert same(held_by(stranger), before)
    plain = decoder_of(config.model_copy(update={"learner": config.learner.model_copy(update={"lora": None})}))
    with pytest.raises(ValueError, match=r"the config has no learner\.lora"):
        plain.read_weights(published(student))
    decoder.swap(held_by(decoder))
    with pytest.raises(ValueError, match="not the base of any"):
        decoder.swap(adapter)


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    config = config_of()
    student, decoder = student_of(config), decoder_of(config)
    train(student, range(2))
    before = held_by(decoder)
    for change, message in (
        ({"model.layers.9.x.weight": (torch.ones(2, 1), torch.ones(1, 2))}, "which the model does not have"),
        ({"model.norm.weight": (torch.ones(80, 1), torch.ones(1, 2))}, r"an adapter \[80, 2\] for \[80\]"),
    ):
        adapter: Any = decoder.read_weights(published(student))
        adapter.factors.update(change)
        with pytest.raises(ValueError, match=message):
            decoder.swap(adapter)
        assert same(held_by(decoder), before)


def test_a_layer_that_an_adapter_does_not_name_is_the_base_s_again() -> None:
    config = config_of()
    student, decoder = student_of(config), decoder_of(config)
    base = held_by(decoder)
    train(student, range(2))
    adapter: Any = decoder.read_weights(published(student))
    decoder.swap(adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(held_by(decoder)[name], base[name])
    del adapter.factors[name]
    decoder.swap(adapter)
    assert torch.equal(held_by(decoder)[name], base[name])


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_are_named_by_their_ends() -> None:
    model = load_trainable(STUDENT, "cpu")
    assert len(targets_of(model, "all-linear")) == 14
    assert targets_of(model, ["k_proj", "q_proj"]) == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "k_proj")
    ]
    assert targets_of(model, ["layers.1.mlp.up_proj", "up_proj"])[1:] == ["model.layers.1.mlp.up_proj"]
    for name in ("proj", "self_attn", "embed_tokens", "norm"):
        with pytest.raises(ModelError, match=rf"'{name}' is not a linear layer of the student; allowed: q_proj, k_pro"):
            targets_of(model, ["q_proj", name])
    with pytest.raises(ModelError, match=r"'lm_head' is not .* may get an adapter \(it is the output head\); allowed"):
        targets_of(model, ["lm_head"])


def test_some_targets_are_all_that_changes(tmp_path: Path) -> None:
    config = config_of({"target_modules": ["layers.0.mlp.up_proj", "v_proj"]})
    student, decoder = student_of(config), decoder_of(config)
    before = held_by(decoder)
    train(student, range(2))
    decoder.swap(decoder.read_weights(published(student)))
    after = held_by(decoder)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        *(f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)),
        "model.layers.0.mlp.up_proj.weight",
    }
    student.write(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(input_ids=IDS).logits, student.model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_weights_stored_as_in_out_are_merged_as_such(tmp_path: Path) -> None:
    """GPT-2's linear layers."""
    torch.manual_seed(1)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 37}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=1)).save_pretrained(tmp_path)
    config = config_of(folder=tmp_path)
    student, decoder = student_of(config), decoder_of(config, tmp_path)
    train(student, range(3))
    decoder.swap(decoder.read_weights(published(student)))
    published_so = held_by(decoder)
    decoder.swap(weights_in(student.capture(step=3, policy_version=3, consumed=[], counters={})))
    assert same(held_by(decoder), published_so)
    torch.testing.assert_close(
        decoder._model.model(input_ids=IDS).logits, student.model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )


# --- dtype and dropout ------------------------------------------------------------------------------------------------


def test_a_base_in_bfloat16_has_the_numbers_that_autocast_has_over_float32() -> None:
    config = config_of(dtype="bfloat16")
    half = student_of(config)
    assert isinstance(half.head, LinearHead), "its logits are made a few rows at a time, as those of any model"
    torch.manual_seed(0)
    plain = load_trainable(STUDENT, "cpu")
    inject(plain, config.learner.lora, targets_of(plain, "all-linear"))  # type: ignore[arg-type]
    plain.eval()
    assert {one.dtype for name, one in half.model.named_parameters() if "base_layer" in name} == {torch.bfloat16}
    assert {one.dtype for name, one in half.model.named_parameters() if "base_layer" not in name} == {torch.float32}
    ids = IDS % 30 + 2
    for model in (half.model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        assert logits.dtype == torch.float32, "the head computes in float32"
        logits.logsumexp(-1).sum().backward()
    ours, theirs = (
        {name: one.grad for name, one in model.named_parameters() if one.requires_grad} for model in (half.model, plain)
    )
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None and torch.equal(gradient, theirs[name]), name


def test_dropout_is_drawn_anew_for_each_update_and_alike_for_each_try_of_it() -> None:
    student = student_of(config_of({"dropout": 0.3}))
    train(student, range(1))  # B is not zero any more

    def tried() -> float:
        loss = gradients(student, 5)
        student.forget_gradients()
        return loss

    first = tried()
    assert tried() == first, "a second try of a step"
    gradients(student, 5)
    student.step(0.0)
    assert tried() != first
    first = tried()
    state = student.capture(step=1, policy_version=1, consumed=[], counters={})  # one step of two updates
    again = student_of(config_of({"dropout": 0.3}))
    again.restore(state)
    loss = gradients(again, 5)
    assert loss == first, "after a restart"
    without = student_of(config_of())
    without.model.load_state_dict(again.model.state_dict())
    assert gradients(without, 5) != loss


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.2}])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, lora: dict[str, Any]) -> None:
    config = config_of(lora)
    whole = student_of(config)
    train(whole, range(3))
    state = whole.capture(step=3, policy_version=3, consumed=["r1"], counters={})
    path = checkpoint.save(tmp_path, state, keep=1)
    expected = train(whole, range(3, 6))
    torch.manual_seed(99)
    resumed = make_student(STUDENT, config)
    resumed.restore(checkpoint.load(path))
    assert train(resumed, range(3, 6)) == expected
    assert published(resumed) == published(whole)
    assert all(".lora_" in name for name in load_file(path / "model.safetensors"))
    adapter, model = (path / "model.safetensors").stat().st_size, (STUDENT / "model.safetensors").stat().st_size
    assert adapter < 0.2 * model


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "its rank is 4, that of this run 8"),
        ({"alpha": 8.0}, "its alpha is 32.0, that of this run 8.0"),
        ({"target_modules": ["q_proj"]}, "which the model lacks"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_refused(lora: dict[str, Any], message: str) -> None:
    former = student_of(config_of())
    train(former, range(1))
    state = former.capture(step=1, policy_version=1, consumed=[], counters={})
    student = student_of(config_of(lora))
    before = published(student)
    with pytest.raises(ValueError, match=message):
        student.restore(state)
    assert published(student) == before


def test_checkpoints_of_adapters_and_of_whole_models_are_not_mixed(tmp_path: Path) -> None:
    config = config_of()
    full = TrainableStudent(STUDENT, config.model_copy(update={"learner": config.learner.model_copy()}))
    lora = student_of(config)
    of_full, of_lora = (one.capture(step=1, policy_version=1, consumed=[], counters={}) for one in (full, lora))
    with pytest.raises(ConfigError, match=r"is of a whole model, this run trains an adapter \(learner.lora\)"):
        lora.restore(of_full)
    with pytest.raises(ConfigError, match=r"is of an adapter, this run trains a whole model"):
        full.restore(checkpoint.load(checkpoint.save(tmp_path, of_lora, keep=1)))


def test_without_peft_a_learner_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"learner.lora needs the package peft: pip install 'katana-distill\[lora\]'"):
        make_student(STUDENT, config_of())
