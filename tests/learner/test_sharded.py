"""A student over several ranks, real processes with gloo: the numbers of one process, and what a failure does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_scenarios
import torch
from rank_scenarios import MODEL, STEPS, settings, state_of, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.engine.loaded import Engines
from learner.checkpoint import CheckpointState, load_newest, save
from learner.student import TrainableStudent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Played = dict[str, Any]


def play(folder: Path, *names: str) -> Played:
    """What the scenarios found. A process of their own forks the ranks: this one may have threads."""
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (*sys.path,))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, rank_scenarios.__file__, str(folder), *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = {name: folder / f"{name}.json" for name in names}
    assert all(path.exists() for path in found.values()), done.stderr
    told: Played = {name: json.loads(path.read_text()) for name, path in found.items()}
    assert all(one["left"] == [] for one in told.values()), "a rank was left behind"
    return {name: one["found"] for name, one in told.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]], CheckpointState]:
    """Five steps of one process, with a checkpoint after the third: folder, figures and state."""
    folder = tmp_path_factory.mktemp("ranks")
    student = TrainableStudent(MODEL, settings(folder, 1))
    figures = train(student, 0, 3)
    save(folder / "one-checkpoints", state_of(student, 3), keep=1)
    figures += train(student, 3, STEPS)
    return folder, figures, state_of(student, STEPS)


@pytest.fixture(scope="module")
def several(one: tuple[Path, list[list[float]], CheckpointState]) -> Played:
    """What all scenarios found: torch is imported once for them."""
    return play(one[0], *rank_scenarios.FORMS)


def loaded(folder: Path, name: str) -> CheckpointState:
    state = load_newest(folder / f"{name}-checkpoints")
    assert state is not None
    return state


def assert_close(found: CheckpointState, expected: CheckpointState) -> None:
    assert list(found.optimizer_groups) == json.loads(json.dumps(expected.optimizer_groups))
    for part, other in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert part.keys() == other.keys()
        for name, tensor in part.items():
            assert tensor.dtype == other[name].dtype
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["steps", "three", "resumed"])
def test_several_ranks_take_the_steps_of_one_process(
    one: tuple[Path, list[list[float]], CheckpointState], several: Played, name: str
) -> None:
    """Also with a batch that has fewer trajectories than there are ranks, and from a checkpoint of one process."""
    folder, figures, state = one
    expected = {"steps": figures, "three": figures[:2], "resumed": figures[3:]}[name]
    assert len(several[name]) == len(expected)
    for found, wanted in zip(several[name], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # loss, diagnostics, norm
    if name != "three":
        assert_close(loaded(folder, name), state)


def test_a_checkpoint_of_two_ranks_is_one_of_one_process(
    one: tuple[Path, list[list[float]], CheckpointState], several: Played
) -> None:
    folder, _, state = one
    found = loaded(folder, "steps")
    assert (found.step, found.policy_version, found.consumed) == (STEPS, STEPS, ("r1",))
    student = TrainableStudent(MODEL, settings(folder, 1))
    student.restore(found)
    assert all(torch.equal(tensor, found.model[name]) for name, tensor in state_of(student, 5).model.items())
    other = TrainableStudent(MODEL, settings(folder, 1))
    other.restore(state)
    assert train(student, 5, 6)[0] == pytest.approx(train(other, 5, 6)[0], rel=1e-5, abs=1e-6)


def test_the_same_steps_on_as_many_ranks_end_with_the_same_bits(
    one: tuple[Path, list[list[float]], CheckpointState], several: Played
) -> None:
    """The norm has a part of every gradient, and what follows a step a part of every parameter."""
    assert several["again"] == several["steps"][:3]


def test_what_leaves_two_ranks_is_what_leaves_one_process(
    one: tuple[Path, list[list[float]], CheckpointState], several: Played
) -> None:
    folder, _, state = one
    student = TrainableStudent(MODEL, settings(folder, 1))
    student.restore(state)
    expected = student.weights(torch.bfloat16)
    found = load_file(folder / "steps-weights.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    Engines(settings(folder, 1)).decoder.swap(found)  # what a worker does; it raises where they do not fit
    whole = AutoModelForCausalLM.from_pretrained(folder / "steps-model", dtype=torch.float32)
    written = {name: tensor for name, tensor in whole.state_dict().items() if name in found}
    saved = loaded(folder, "steps").model
    assert written.keys() == found.keys() == saved.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, saved[name])
        assert torch.equal(tensor.to(torch.bfloat16), found[name])


def test_bfloat16_is_what_autocast_makes_of_it(several: Played, tmp_path: Path) -> None:
    """Rows alone in their micro-batch have the same forward, bit for bit; only the sums have another order."""
    found = several["bfloat16"]
    expected = train(TrainableStudent(MODEL, settings(tmp_path, 1, "bfloat16")), 0, 2, max_tokens=1)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=2e-3)
    exact = train(TrainableStudent(MODEL, settings(tmp_path, 1)), 0, 1, max_tokens=1)
    assert abs(exact[0][0] - expected[0][0]) > 1e-6 * exact[0][0], "bfloat16 computes nothing else"


def test_a_share_that_is_not_finite_shows_on_rank_0_and_is_forgotten_everywhere(
    several: Played, tmp_path: Path
) -> None:
    found = several["not_finite"]
    assert math.isnan(found["spoilt"][0]) and math.isnan(found["spoilt"][-1])
    assert math.isnan(found["alone"][0])
    student = TrainableStudent(MODEL, settings(tmp_path, 1))
    whole = rank_scenarios.batch_of(0)
    rest = [one for one in whole if one.rid != rank_scenarios.rid_of(1)]
    assert found["rest"] == pytest.approx([*rank_scenarios.add(student, rest), student.clip()], rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_the_part_of_one_rank_ends_the_learner_with_its_words(several: Played, rank: int) -> None:
    found = several[f"raises_{rank}"]
    assert f"rank {rank}: RuntimeError: DefaultCPUAllocator: can't allocate memory" in found["failure"]


def test_a_killed_rank_asks_the_learner_to_stop_and_no_work_is_possible(several: Played) -> None:
    found = several["dies"]
    assert found["asked"]
    assert found["failure"] == "capture: rank 1 of the learner was ended by signal 9"
    assert found["at the end"] == "rank 1 of the learner was ended by signal 9"
