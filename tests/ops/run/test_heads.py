"""What `katana check` says of a student's output head, for configs without weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from samples import make_config
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from learner.head import LinearHead, output_head
from ops.run import heads
from ops.run.check import check
from ops.run.heads import TESTED, whole_logits

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def folder_of(tmp_path: Path, model_type: str) -> Path:
    AutoConfig.for_model(model_type, **SHAPE).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "model_type", ["olmo2", "qwen3_moe", "gpt_neox", "falcon_h1", "nanochat", "cohere2", "opt", *sorted(TESTED)]
)
def test_a_head_is_examined_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr(heads, "TESTED", frozenset())
    assert whole_logits(folder_of(tmp_path, model_type), model_type) == ""


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_the_tested_types_are_those_whose_logits_come_in_pieces(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE)).eval()
    assert isinstance(output_head(model), LinearHead)


class SquaredConfig(Qwen3Config):
    model_type = "squared"


class SquaredForCausalLM(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    config_class = SquaredConfig

    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        output.logits = output.logits + 0.01 * output.logits**2
        return output


@pytest.fixture
def squared(tmp_path: Path) -> Path:
    AutoConfig.register("squared", SquaredConfig, exist_ok=True)
    AutoModelForCausalLM.register(SquaredConfig, SquaredForCausalLM, exist_ok=True)
    SquaredConfig(**SHAPE).save_pretrained(tmp_path)
    return tmp_path


def test_a_head_of_another_kind_is_told(squared: Path) -> None:
    assert "the logits of a whole micro-batch are held in memory" in whole_logits(squared, "squared")


def test_a_model_that_cannot_be_built_is_left_to_the_learner(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    assert "cannot be examined before it is loaded" in whole_logits(tmp_path, "no such")


def test_check_warns_and_counts_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
    config = make_config(tmp_path, **shipped)
    lines = check(config, examine=True).lines
    assert not [line for line in lines if "output head" in line]

    def heads_mb(lines: list[str]) -> float:
        (line,) = (line for line in lines if line.startswith("memory     learner on cpu: at most "))
        found = re.search(r"head ([0-9,]+) MB", line)
        assert found is not None
        return float(found[1].replace(",", ""))

    monkeypatch.setattr("ops.run.check.whole_logits", lambda folder, model_type: f"told of {model_type}")
    whole = check(config, examine=True).lines
    assert [line for line in whole if line.startswith("warning")] == ["warning    ops/models/student: told of qwen3"]
    assert heads_mb(whole) > heads_mb(lines)
    assert heads_mb(check(config).lines) == heads_mb(lines)
