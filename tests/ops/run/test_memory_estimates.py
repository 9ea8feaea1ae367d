"""Estimated memory of every role against what its engine takes, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_sets import put_tiny_qwen3
from role_memory import LENGTH, VOCAB, learner_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engine.models import load_model
from common import memory
from common.config import Config
from common.memory import ModelShape, Training, shape_of
from common.pretrained import PACKAGE_ROOT as ROOT
from ops.run.devices import devices_of
from ops.run.memory import GB, Machine, by_device, needs, qwen3, server_lines, shape_in, training_of

LAYERS = 4


def put_model(folder: Path, **changes: Any) -> Path:
    """A Qwen3 large enough that its tensors, and not what torch holds besides, are what is measured."""
    put_tiny_qwen3(folder, ids=VOCAB)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    Qwen3ForCausalLM(Qwen3Config(**shape | changes)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_model(tmp_path_factory.mktemp("model"))


# --- the engines -----------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"role": "writer", "dtype": "float32", "slots": 16, "top_p": 1.0, "prefill": 512},
    {"role": "writer", "dtype": "float32", "slots": 32, "top_p": 0.9, "prefill": 256},
    {"role": "writer", "dtype": "bfloat16", "slots": 8, "top_p": 1.0, "prefill": 512},
    {"role": "scorer", "dtype": "float32", "slots": 8, "prefill": 512},
    {"role": "scorer", "dtype": "bfloat16", "slots": 4, "prefill": 512},
    {"role": "learner", "settings": {"dtype": "float32", "micro_batch_tokens": 512}},
    {"role": "learner", "settings": {"dtype": "bfloat16", "micro_batch_tokens": 512}},
    {"role": "learner", "settings": {"dtype": "float32", "micro_batch_tokens": 512, "gradient_checkpointing": True}},
    {"role": "learner", "settings": {"dtype": "float32", "micro_batch_tokens": 512, "lora": {"rank": 8}}},
    {"role": "learner", "settings": {"dtype": "bfloat16", "micro_batch_tokens": 512, "lora": {"rank": 8}}},
]


def estimate(folder: Path, case: dict[str, Any]) -> int:
    model = shape_in(folder)
    if case["role"] == "learner":
        training = training_of(learner_config(folder, folder, case["settings"]))
        return memory.learner(model, training, on_gpu=False, published="float32").peak
    settings = {name: case[name] for name in ("dtype", "slots", "prefill")} | {"length": LENGTH, "vocab": VOCAB}
    if case["role"] == "writer":
        return memory.writer(model, top_p=case["top_p"], **settings).peak
    return memory.scorer(model, **settings).peak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_takes_what_is_estimated_within_a_quarter(folder: Path) -> None:
    # Every tensor has pages of its own, which it gives back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [sys.executable, str(ROOT / "tests" / "role_memory.py"), str(folder), json.dumps(CASES)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    ratios = {json.dumps(case): estimate(folder, case) / bytes for case, bytes in zip(CASES, measured, strict=True)}
    wrong = {case: round(ratio, 2) for case, ratio in ratios.items() if not 0.75 <= ratio <= 1.25}
    assert not wrong, ratios


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_shape_read_from_a_folder_is_the_model_s(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device="cpu", vocab_size=VOCAB)
    whole = sum(parameter.numel() for parameter in model.parameters())
    shape = shape_in(folder)
    assert shape.parameters == pytest.approx(whole, rel=0.01)  # the file has a header
    assert shape.outside == VOCAB * 256
    assert (shape.queries, shape.keys, shape.qk_norm, shape.eager) == (256, 128, True, False)


@pytest.mark.parametrize(
    ("size", "parameters"), [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191), ("14B", 14.768)]
)
def test_parameters_are_counted_as_published(size: str, parameters: float) -> None:
    """Qwen's own figures: 0.6, 1.7, 4.0, 8.2 and 14.8 billion."""
    assert qwen3(size).parameters / 1e9 == pytest.approx(parameters, rel=0.002)


def test_experts_are_counted_all_and_computed_a_few() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": True}
    shape = shape_of(text | moe)
    assert shape.inner == 64
    assert shape.linear > 2 * 8 * 3 * 64 * 32


def shape(**changes: Any) -> ModelShape:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return shape_of(text | {"vocab_size": 1000, "tie_word_embeddings": True} | changes)


def test_what_lowers_the_learner_s_peak() -> None:
    def peak(**changes: Any) -> int:
        return memory.learner(
            shape(num_hidden_layers=24), Training("bfloat16", 4096, 1024, **changes), on_gpu=True, published="bfloat16"
        ).peak

    assert peak(checkpointing=True) < 0.5 * peak()
    assert peak(rank=8) < peak()
    assert peak(ranks=4) < peak(ranks=2) < peak()


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_auto_slots_take_a_quarter_of_what_is_left(tmp_path: Path) -> None:
    config = learner_config(tmp_path, tmp_path, {"device": "auto"})
    auto = {"rollout": {"device": "auto"}, "teacher": {"device": "auto"}, "eval": {"device": "auto", "slots": "auto"}}
    tree = config.model_dump() | {}
    for name, settings in auto.items():
        tree[name] |= settings
    config = Config.model_validate(tree)
    found = {one.name: one for one in needs(config, shape(), {"": shape()}, Machine(1, 2 * GB), vocab=1000)}
    assert {one.device for one in found.values()} == {"cuda:0"}
    assert 1 <= found["rollout-0"].slots <= config.most_slots
    tight = {one.name: one for one in needs(config, shape(), {"": shape()}, Machine(1, GB // 2), vocab=1000)}
    assert tight["evaluator"].slots == 1
    assert set(by_device([*found.values()])) == {"cuda:0"}


def test_who_has_a_server_write_holds_no_model_and_needs_no_gpu(tmp_path: Path) -> None:
    config = learner_config(tmp_path, tmp_path, {"device": "auto"})
    tree = config.model_dump()
    tree["rollout"] |= {"device": "auto", "workers": 2, "engine": "vllm", "vllm": {"urls": ["http://a:8000"]}}
    tree["eval"] |= {"device": "auto", "engine": "vllm", "vllm": {"urls": ["http://b:8000"]}, "slots": 8}
    tree["teacher"] |= {"device": "auto"}
    config = Config.model_validate(tree)
    found = {one.name: one for one in needs(config, shape(), {"": shape()}, Machine(2, 2 * GB), vocab=1000)}
    copies = 2 * 4 * shape().parameters
    for name in ("rollout-0", "rollout-1", "evaluator"):
        assert (found[name].device, found[name].part.peak, found[name].slots) == ("cpu", copies, 0)
    adapters = Config.model_validate(tree | {"learner": tree["learner"] | {"lora": {"rank": 4}}})
    of_lora = {one.name: one for one in needs(adapters, shape(), {"": shape()}, Machine(2, 2 * GB), vocab=1000)}
    assert of_lora["rollout-0"].part.device["published weights"] == 2 * 4 * shape().adapter(4) < copies / 2
    assert found["teacher-0"].device == "cuda:1"  # nobody else is dealt over what the learner leaves
    rollouts, evaluations = server_lines(config, shape())
    assert "of rollout.vllm: weights" in rollouts and "for 64, as many as one rollout worker has there" in rollouts
    assert "of eval.vllm: weights" in evaluations and "for 8, as many as one evaluator has there" in evaluations
    elsewhere = Config.model_validate(tree | {"rollout": tree["rollout"] | {"device": "cuda"}})
    assert "rollout.device" not in dict(devices_of(elsewhere))
    tree["rollout"] |= {"engine": "slots"}
    tree["eval"] |= {"every_steps": 0}
    assert server_lines(Config.model_validate(tree), shape()) == []
