"""Engines stay loaded from shift to shift, as long as they are those of the config and of the models on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import make_config

from actors.engine import ScoreRequest
from actors.engine.loaded import Engines, engines_for
from actors.engine.models import load_model
from common.pretrained import PACKAGE_ROOT, ModelError


def test_engines_are_kept_for_the_same_models_and_not_for_one_that_was_written_over(tmp_path: Path) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(PACKAGE_ROOT / "ops" / "models" / name, tmp_path / name)
    models = {name: {"model": str(tmp_path / name)} for name in ("student", "teacher")}
    config = make_config(tmp_path, **models, data={"max_prompt_length": 16})
    first = engines_for(config)
    assert engines_for(config) is first
    weights = tmp_path / "teacher" / "model.safetensors"
    draft = weights.with_suffix(".tmp")
    draft.write_bytes(weights.read_bytes())
    draft.replace(weights)
    second = engines_for(config)
    assert second is not first
    assert engines_for(config) is second


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [{"hidden_act": "nonsense"}, {"head_dim": "wide"}, {"layer_types": ["full_attention"]}, {"vocab_size": -1}],
    ids=str,
)
def test_a_config_that_a_model_s_code_fails_on_is_said_with_the_folder(tmp_path: Path, odd: dict[str, Any]) -> None:
    from learner.student import TrainableStudent

    folder = tmp_path / "odd"
    shutil.copytree(PACKAGE_ROOT / "ops" / "models" / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | odd))
    for load in (
        lambda: load_model(folder, dtype="float32", device="cpu", vocab_size=37),
        lambda: TrainableStudent(folder, make_config(tmp_path)),
    ):
        with pytest.raises(ModelError, match=f"{folder}: cannot be loaded \\([A-Za-z]+: "):
            load()


def test_a_teacher_is_spread_by_transformers_and_scores_alike(tmp_path: Path) -> None:
    models = {name: {"model": str(PACKAGE_ROOT / "ops" / "models" / name)} for name in ("student", "teacher")}
    rng, found = np.random.default_rng(0), []
    prompt, tokens = rng.integers(3, 37, 9).astype(np.int32), rng.integers(3, 37, 20).astype(np.int32)
    support = np.stack([rng.permutation(np.arange(3, 37))[:4] for _ in tokens]).astype(np.int32)
    for device_map in (None, "auto"):
        config = make_config(tmp_path, **models | {"teacher": models["teacher"] | {"device_map": device_map}})
        scorer = Engines(config).scorer()
        request = ScoreRequest(key="r", prompt=prompt, start=0, tokens=tokens, support_ids=support)
        found.append(scorer.score([request])[0].teacher_logprobs)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("quantised", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "autoawq|gptqmodel"),
    ],
    ids=["bitsandbytes", "gptq", "awq"],
)
def test_a_quantised_model_names_the_package_that_is_missing(
    tmp_path: Path, quantised: dict[str, Any], package: str
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(PACKAGE_ROOT / "ops" / "models" / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(ModelError, match=f"(?i)cannot be loaded .*({package})"):
        load_model(folder, dtype="float32", device="cpu", vocab_size=37)


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_without_accelerate_what_needs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: str | None
) -> None:
    monkeypatch.setattr("actors.engine.models.find_spec", lambda name: None)
    folder = tmp_path / "small"
    shutil.copytree(PACKAGE_ROOT / "ops" / "models" / "teacher", folder)
    if device_map is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"needs the package accelerate: pip install accelerate"):
        load_model(folder, dtype="float32", device="cpu", vocab_size=37, device_map=device_map)
