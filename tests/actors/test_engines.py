"""Engines stay loaded from shift to shift, as long as they are those of the config and of the models on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from samples import make_config

from actors.engines import engines_for
from common.pretrained import PACKAGE_ROOT


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
