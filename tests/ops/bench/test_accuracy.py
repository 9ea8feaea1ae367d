"""Time to accuracy: checkpoints are evaluated in their order, up to the first that reaches the target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import step_line, write_lines
from samples import make_config
from transformers import AutoModelForCausalLM

from common.config import Config, ConfigError
from common.runfiles.names import CHECKPOINTS, METRICS
from common.runfiles.records import Scores
from learner.checkpoint import capture, save
from ops.bench.accuracy import looks_until, standard_error_at_most, time_to_accuracy, to_be_evaluated
from ops.cli.main import main
from ops.run.evaluator import Evaluator

STUDENT = Path(__file__).parents[3] / "ops/models/student"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    models = {"student": {"model": "ops/models/student"}, "teacher": {"model": "ops/models/teacher"}}
    return make_config(tmp_path, **models, rollout={"max_completion_length": 192}, eval={"problems": 6, "k": 2})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose checkpoint of step 1 is always wrong, and those of steps 2 and 3 are the shipped student."""
    model: Any = AutoModelForCausalLM.from_pretrained(STUDENT)
    wrong: Any = AutoModelForCausalLM.from_pretrained(STUDENT)
    with torch.no_grad():
        wrong.model.norm.weight.zero_()  # every outcome is equally likely
    for step, one in ((1, wrong), (2, model), (3, model)):
        optimizer = torch.optim.AdamW(one.parameters())
        save(
            tmp_path / CHECKPOINTS,
            capture(one, optimizer, step=step, policy_version=step, consumed=[], counters={}),
            keep=9,
        )
    write_lines(tmp_path / METRICS, [step_line(step, unix_s=100.0 + step**2) for step in (1, 2, 3)])
    return tmp_path


def test_the_first_checkpoint_that_reaches_the_target_is_the_last_one_evaluated(config: Config, folder: Path) -> None:
    evaluator = Evaluator(config)
    start = evaluator.measure()
    assert start is not None and 0.1 < start.avg_at_k < 1.0
    evaluator.writer.swap({name: torch.zeros_like(value) for name, value in _state().items()})
    looks = looks_until(evaluator, folder, start.avg_at_k)
    assert [(look.step, look.avg_at_k) for look in looks] == [(1, 0.0), (2, start.avg_at_k)]
    assert [look.since_first_step_s for look in looks] == [0.0, 3.0]
    assert looks[1].standard_error_at_most == standard_error_at_most(start) > 0


def test_without_one_that_reaches_it_all_are_evaluated(config: Config, folder: Path) -> None:
    looks = looks_until(Evaluator(config), folder, 1.0)
    assert [look.step for look in looks] == [1, 2, 3]
    assert max(look.avg_at_k for look in looks) < 1.0


def _state() -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(STUDENT)
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def test_the_standard_error_treats_a_problem_s_samples_as_one() -> None:
    scores = Scores(k=4, n=25, avg_at_k=0.2, pass_at_k=0.4, mean_length=9.0, eos_rate=1.0)
    assert standard_error_at_most(scores) == pytest.approx(0.08)  # sqrt(0.2 × 0.8 / 25)


def test_a_data_set_without_benchmarks_has_no_accuracy(config: Config, tmp_path: Path) -> None:
    tree = config.model_dump() | {"data": {"task": "dataset", "path": str(tmp_path / "rows.jsonl")}}
    tree["eval"] |= {"every_steps": 0}
    with pytest.raises(ConfigError, match=r"eval.data: names no benchmark"):
        to_be_evaluated(Config.model_validate(tree))


@pytest.mark.parametrize(
    "words", [["time-to-accuracy"], ["engine", "--target", "0.5"], ["time-to-accuracy", "--target", "1.5"]]
)
def test_a_target_belongs_to_time_to_accuracy_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", *words])
    except SystemExit as exit_:
        code = int(str(exit_.code))
    assert code == 2
    assert "target" in capsys.readouterr().err


def test_each_repeat_is_a_run_of_its_own_evaluated_on_the_problems_of_the_first(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are a recorded one here; tests/benchmarks/test_gpu.py makes a real one in the same way."""
    ran: list[Config] = []

    def run(here: Config) -> None:
        ran.append(here)
        here.run_dir.mkdir()
        for name in (CHECKPOINTS, METRICS):
            os.symlink(folder / name, here.run_dir / name)

    monkeypatch.setattr("ops.bench.accuracy.run_quietly", run)
    found = time_to_accuracy(config, 2, target=0.05)
    assert (found["runs"], found["reached"], found["problems"], found["k"]) == (2, 2, 6, 2)
    assert [[look["step"] for look in looks] for looks in found["looks"]] == [[1, 2]] * 2
    assert all(looks[1]["avg_at_k"] >= 0.05 for looks in found["looks"])
    assert found["seconds"]["median"] == found["looks"][0][1]["since_first_step_s"] == 3.0
    assert [here.seed for here in ran] == [config.seed, config.seed + 1]
    assert all((here.eval.every_steps, here.checkpoints.keep) == (0, here.learner.max_steps) for here in ran)
    assert not any(here.run_dir.exists() for here in ran)  # each had a folder of its own, which is gone
