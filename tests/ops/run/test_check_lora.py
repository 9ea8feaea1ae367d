"""`learner.lora` in `katana check` and `katana run`: its layers, its size, and what is wrong, before a start."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.pretrained import PACKAGE_ROOT
from ops.cli.main import main

DEMO = str(PACKAGE_ROOT / "ops" / "experiments" / "demo.yaml")


def test_it_says_how_much_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    assert main(["check", DEMO, "--set", "learner.lora.rank=8", "--set", "learner.lora.target_modules=[q_proj]"]) == 0
    # Two layers of [80, 80]; A and B have 8 × 80 numbers each.
    told = capsys.readouterr().out
    assert (
        "LoRA       rank 8, alpha 32, dropout 0 on 2 layers: 2,560 parameters are trained beside 150,640 (1.70%)"
        in told
    )


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_target_that_is_no_layer_is_named_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    sets = ("learner.lora.target_modules=[q_proj, query]", f"runs_dir={tmp_path}")
    assert main([command, DEMO, *(part for one in sets for part in ("--set", one))]) == 2
    told = capsys.readouterr().err
    assert "learner.lora.target_modules: 'query' is not a linear layer of the student; allowed: q_proj, k_proj" in told
    assert not any(tmp_path.iterdir())


def test_without_peft_both_say_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.lora.find_spec", lambda name: None)
    for command in ("check", "run"):
        assert main([command, DEMO, "--set", "learner.lora.rank=8", "--set", f"runs_dir={tmp_path}"]) == 2
        told = capsys.readouterr().err
        assert "learner.lora needs the package peft: pip install 'katana-distill[lora]'" in told
    assert not any(tmp_path.iterdir())
