"""Engines stay loaded from shift to shift, as long as they are those of the config and of the models on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from samples import make_config

from actors.engine.loaded import engines_for
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
    from learner.train import _load

    folder = tmp_path / "odd"
    shutil.copytree(PACKAGE_ROOT / "ops" / "models" / "student", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | odd))
    for load in (
        lambda: load_model(folder, dtype="float32", device="cpu", vocab_size=37),
        lambda: _load(folder, make_config(tmp_path)),
    ):
        with pytest.raises(ModelError, match=f"{folder}: cannot be loaded \\([A-Za-z]+: "):
            load()
