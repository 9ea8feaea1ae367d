"""What model folders of many families say, and what lies beside their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.pretrained import (
    OTHER_NAMES,
    PACKAGE_ROOT,
    ModelError,
    load_tokenizer,
    read_facts,
    read_model_config,
    text_of,
    weight_files,
)

STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"


def put(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": 1} | values))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "gptj", "codegen", "gpt_bigcode", "bloom", "opt", "llama", "qwen3", "mpt"])
def test_lengths_and_widths_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    config = CONFIG_MAPPING[family]()
    config.save_pretrained(tmp_path)
    found = read_model_config(tmp_path)
    for name in OTHER_NAMES:
        if hasattr(config, name):
            assert found[name] == getattr(config, name), name


def test_every_name_that_a_decoder_of_transformers_uses_is_read() -> None:
    """Those of encoder-decoders are not: they are refused."""
    missed = {
        (family, name, own)
        for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if family in CONFIG_MAPPING
        for name, own in CONFIG_MAPPING[family].attribute_map.items()
        if name in OTHER_NAMES and own not in OTHER_NAMES[name] and "coder" not in own and family != "xlm"
    }
    assert not missed


@pytest.mark.parametrize("name", ["max_position_embeddings", *OTHER_NAMES["max_position_embeddings"]])
def test_a_context_length_is_read_by_each_family_s_own_name(tmp_path: Path, name: str) -> None:
    assert read_facts(put(tmp_path, **{name: 77})).max_position_embeddings == 77


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [64]])
def test_a_length_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelError, match=r"config\.json: max_position_embeddings is .*allowed"):
        read_facts(put(tmp_path, n_positions=value))


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", [1, -1], [[1]], {"id": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_eos_that_is_no_id_is_refused_with_its_file(tmp_path: Path, file: str, value: object) -> None:
    put(tmp_path)
    found = json.loads((tmp_path / file).read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps(found | {"eos_token_id": value}))
    with pytest.raises(ModelError, match=rf"{file}: eos_token_id is .*allowed: a token id from 0"):
        read_facts(tmp_path)


def test_no_eos_in_one_file_leaves_that_of_the_other(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_facts(tmp_path).stop_ids == (1,)


def test_weights_are_those_that_are_loaded_and_nothing_beside_them(tmp_path: Path) -> None:
    for name in ("consolidated", "model", "model.fp16", "part-1", "part-2"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path)[0].name == "model.fp16.safetensors"  # no index yet
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == ["part-1.safetensors", "part-2.safetensors"]


def test_text_keeps_its_spaces_whatever_the_tokenizer_would_tidy(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "s")
    tokenizer = load_tokenizer(tmp_path / "s")
    tokenizer.clean_up_tokenization_spaces = True
    ids = list(range(2, 20))
    assert text_of(tokenizer, ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
