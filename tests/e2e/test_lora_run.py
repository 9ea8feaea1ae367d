"""LoRA with real processes: killed learners, audit and replay, and the same bits after an interruption."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import SMALL, check_books, children_of, finish, read, start, wait_for_steps
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.pretrained import PACKAGE_ROOT
from ops.cli.main import main

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"
LORA = ("learner.lora.rank=8", "learner.learning_rate=2e-3")


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 34).view(2, 16)
    found: torch.Tensor = model(input_ids=ids).logits.detach()
    return found


def test_a_run_whose_learner_is_killed_books_everything_once_and_leaves_model_and_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e2e"
    process = start(tmp_path, settings=(*SMALL, *LORA, "learner.lora.dropout=0.05"))
    for steps in (1, 3):
        wait_for_steps(folder, steps, process)
        os.kill(children_of(folder)["learner"], signal.SIGKILL)
        time.sleep(0.5)
    code, output = finish(process)
    assert code == 0, output
    check_books(folder, steps=6)
    log = (folder / "logs" / "learner.log").read_text()
    assert "continuing from step" in log
    assert "refused" not in (folder / "logs" / "rollout-0.log").read_text()
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)) == 6 * 16
    assert {line["step"] for line in read(folder / "eval.jsonl")} == {0, 3, 6}

    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2
    assert all(
        ".lora_" in name for name in load_file(max((folder / "checkpoints").glob("step-*[0-9]")) / "model.safetensors")
    )

    assert main(["audit", str(folder), "--samples", "1", "--rollouts", "4"]) == 0
    assert main(["replay", str(folder), "--sweep", "termination.eta=0.3,0.6"]) == 0
    for path in (folder / "model").iterdir():  # then the audit goes by the newest of weights/
        path.unlink()
    capsys.readouterr()
    assert main(["audit", str(folder), "--samples", "1", "--rollouts", "4"]) == 0
    assert "weights/v" in capsys.readouterr().out


def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = (
        *("deterministic=true", "learner.batch_size=4", "learner.max_steps=6", "rollout.slots=4"),
        *("rollout.max_completion_length=60", "termination.policy=none", "checkpoints.every_steps=2"),
        *("eval.every_steps=0", *LORA, "learner.lora.dropout=0.1"),
    )
    code, output = finish(start(tmp_path, name="whole", settings=settings))
    assert code == 0, output
    process = start(tmp_path, name="broken", settings=settings)
    wait_for_steps(tmp_path / "broken", 3, process)
    os.kill(children_of(tmp_path / "broken")["learner"], signal.SIGKILL)
    wait_for_steps(tmp_path / "broken", 4, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout_s=40)[0] == 130
    code, output = finish(start(tmp_path, "--resume", name="broken"))
    assert code == 0, output
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    losses = [[(line["step"], line["loss"]) for line in read(folder / "metrics.jsonl")] for folder in (whole, broken)]
    assert losses[0] == losses[1]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
