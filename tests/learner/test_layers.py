"""The student's gradients with layers that are computed again or compiled, and steps too small for bfloat16."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import peak_bytes
from samples import make_config
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.config import Config
from common.pretrained import PACKAGE_ROOT, ModelError, Pair, read_facts
from learner.batch import Trajectory
from learner.layers import checkpoint_layers
from learner.student import TrainableStudent

STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"
FACTS = read_facts(STUDENT)


def trajectories(count: int = 4, kept: int = 20) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    share = np.float32(-np.log(5))
    return [
        Trajectory(
            rid=f"r{number}",
            arm="treated",
            prompt=rng.integers(5, 30, 6).astype(np.int32),
            tokens=rng.integers(5, 30, kept - number).astype(np.int32),
            support_ids=np.tile(np.arange(10, 13, dtype=np.int32), (kept - number, 1)),
            teacher_logprobs=np.full((kept - number, 4), share),
            teacher_tail=np.full(kept - number, share),
            teacher_sampled=np.full(kept - number, share),
            rollout_logprobs=np.full(kept - number, share),
            sampling_logprobs=np.full(kept - number, share),
            oldest_version=0,
        )
        for number in range(count)
    ]


def student_of(tmp_path: Path, **learner: Any) -> tuple[TrainableStudent, Config]:
    config = make_config(tmp_path, learner=learner)
    return TrainableStudent(STUDENT, config), config


def take(student: TrainableStudent, config: Config, batch: list[Trajectory]) -> dict[str, Tensor]:
    pair = Pair(FACTS, {"": FACTS}, FACTS.stop_ids, FACTS.vocab_size)
    student.add_gradients(
        batch,
        pair,
        max_tokens=config.learner.micro_batch_tokens,
        busy=contextlib.nullcontext,
        between=lambda: None,
    )
    return {name: one.grad.clone() for name, one in student.model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_are_computed_again_have_the_same_gradients(tmp_path: Path, dtype: str) -> None:
    batch = trajectories()
    expected = take(*student_of(tmp_path, dtype=dtype), batch)
    student, config = student_of(tmp_path, dtype=dtype, gradient_checkpointing=True)
    ran: list[int] = []
    student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    got = take(student, config, batch)
    assert len(ran) == 2  # forward, and again in backward
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_layers_that_are_computed_again_keep_less(tmp_path: Path) -> None:
    batch = trajectories(count=16, kept=180)
    peaks = []
    for again in (False, True):
        student, config = student_of(tmp_path, gradient_checkpointing=again, micro_batch_tokens=4096)
        take(student, config, batch[:1])
        peaks.append(peak_bytes(lambda student=student, config=config: take(student, config, batch)))  # type: ignore[misc]
    assert peaks[1] < 0.6 * peaks[0]


def test_dropout_stays_off_when_layers_are_computed_again(tmp_path: Path) -> None:
    student, _ = student_of(tmp_path, gradient_checkpointing=True)
    assert not any(module.training for module in student.model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at whatever an object has
def test_compiled_layers_have_the_same_gradients(tmp_path: Path) -> None:
    """Also of another shape, for which nothing is compiled again."""
    student, config = student_of(tmp_path, compile=True, gradient_checkpointing=True)
    for batch in (trajectories(), trajectories(count=3, kept=11)):
        got, expected = take(student, config, batch), take(*student_of(tmp_path), batch)
        student.forget_gradients()
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert float((got[name] - gradient).abs().max()) < 1e-4 * float(gradient.abs().max()), name


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear has no layers that transformers can compute again: learner\.grad"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_what_a_student_saves_has_the_model_s_own_names(tmp_path: Path) -> None:
    plain, _ = student_of(tmp_path)
    changed, _ = student_of(tmp_path, compile=True, gradient_checkpointing=True)
    assert list(plain.model.state_dict()) == list(changed.model.state_dict())
    changed.write(tmp_path / "model")
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(again.config, Qwen3Config)


def test_steps_of_a_millionth_survive_in_bfloat16(tmp_path: Path) -> None:
    """Adam's first steps are of the learning rate's size: a parameter in bfloat16 would lose them."""
    student, config = student_of(tmp_path, dtype="bfloat16", learning_rate=1e-6)
    before = {name: one.detach().clone() for name, one in student.model.named_parameters()}
    for _ in range(5):
        take(student, config, trajectories())
        student.step(1e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (dict(student.model.named_parameters())[name].detach() - before[name]).abs()
    assert moved.dtype == torch.float32
    assert 2e-6 < float(moved.median()) < 6e-6
    lost = before[name].bfloat16() - (before[name].bfloat16() - 5e-6)
    assert float((lost == 0).float().mean()) > 0.9
