"""The configs of ops/experiments/machines and of the paper's grid fit the GPUs that they are for; docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from actors.placing import DEVICE, device_here, with_learner_here
from common.config import Config, load
from common.config.sections import LearnerSettings
from common.pretrained import PACKAGE_ROOT as ROOT
from ops.cli.main import main
from ops.run.devices import spread
from ops.run.local import LocalRun
from ops.run.memory import GB, Machine, by_device, needs, on_host, qwen3, scaling_table

EXPERIMENTS = ROOT / "ops" / "experiments"
VOCAB = 151_669


def known(path: Path) -> bool:
    """Whether this version has all keys of the learner that the config sets."""
    return yaml.safe_load(path.read_text())["learner"].keys() <= LearnerSettings.model_fields.keys()


MACHINES = [("1x80gb-1.7b-lora", "1.7B", 1), ("2x80gb-1.7b", "1.7B", 2), ("8x80gb-4b", "4B", 8)]


@pytest.mark.parametrize(("name", "student", "gpus"), MACHINES)
def test_a_machine_s_config_fits_it(name: str, student: str, gpus: int) -> None:
    path = EXPERIMENTS / "machines" / f"{name}.yaml"
    if not known(path):
        pytest.skip("this version has no such learner")
    config = load(path)
    assert config.student.model == f"Qwen/Qwen3-{student}-Base"
    found = needs(config, qwen3(student), {"": qwen3("8B")}, Machine(gpus, 80 * GB), vocab=VOCAB)
    total = by_device(found)
    assert set(total) == {f"cuda:{index}" for index in range(gpus)}
    assert max(total.values()) <= 80 * GB, {device: size / GB for device, size in total.items()}
    assert all(one.slots >= 4 for one in found if one.name != "learner"), [(one.name, one.slots) for one in found]
    assert on_host(found) < 256 * GB


def test_the_paper_s_config_of_1_7b_fits_two_gpus() -> None:
    config = load(EXPERIMENTS / "paper" / "1.7b-kat.yaml")
    total = by_device(needs(config, qwen3("1.7B"), {"": qwen3("8B")}, Machine(2, 80 * GB), vocab=VOCAB))
    assert max(total.values()) <= 80 * GB


# --- devices ----------------------------------------------------------------------------------------------------------


def config_of(**workers: int) -> Config:
    sections = ("rollout", "teacher", "learner", "eval")
    counts = [f"{name}.workers={count}" for name, count in workers.items()]
    return load(EXPERIMENTS / "demo.yaml", [*(f"{section}.device=auto" for section in sections), *counts])


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"),
    [
        (0, {}, {"learner": "cpu", "teacher-0": "cpu", "rollout-0": "cpu", "evaluator": "cpu"}),
        (1, {}, {"learner": "cuda:0", "teacher-0": "cuda:0", "rollout-0": "cuda:0", "evaluator": "cuda:0"}),
        (2, {}, {"learner": "cuda:0", "teacher-0": "cuda:1", "rollout-0": "cuda:1", "evaluator": "cuda:1"}),
        (3, {}, {"learner": "cuda:0", "teacher-0": "cuda:1", "rollout-0": "cuda:2", "evaluator": "cuda:1"}),
        (4, {}, {"learner": "cuda:0", "teacher-0": "cuda:1", "rollout-0": "cuda:2", "evaluator": "cuda:3"}),
        (
            4,
            {"rollout": 2},
            {"learner": "cuda:0", "teacher-0": "cuda:1", "rollout-0": "cuda:2", "rollout-1": "cuda:3"}
            | {"evaluator": "cuda:1"},
        ),
    ],
)
def test_processes_are_spread_over_the_gpus(gpus: int, workers: dict[str, int], expected: dict[str, str]) -> None:
    config = config_of(**{"rollout": 1, "teacher": 1} | workers)
    assert spread(config, gpus) == expected


def test_auto_is_what_a_run_has_chosen_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "cuda:5")
    config = config_of()
    assert device_here("auto") == with_learner_here(config).learner.device == "cuda:5"
    assert device_here("cpu") == "cpu"
    monkeypatch.delenv(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_here("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_here("auto") == "cpu"


def test_a_run_tells_each_process_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    def begin(words: list[str], log: Path, environment: dict[str, str]) -> None:
        told[log.stem] = environment[DEVICE]

    monkeypatch.setattr("ops.run.local.gpus_here", lambda: 3)
    monkeypatch.setattr("ops.run.local.start", begin)
    config = config_of(rollout=2, teacher=1).model_copy(update={"runs_dir": str(tmp_path)})
    config.run_dir.mkdir()
    run = LocalRun(config, "key")
    for child in run._children:
        run._start(child)
    assert told == spread(config, 3) | {"feeder": "cpu", "arbiter": "cpu"}


def test_a_device_that_is_named_stays() -> None:
    config = load(EXPERIMENTS / "demo.yaml", ["learner.device=cuda:3", "rollout.device=auto", "rollout.workers=1"])
    found = spread(config, 4)
    assert (found["learner"], found["rollout-0"], found["teacher-0"]) == ("cuda:3", "cuda:2", "cpu")


def test_check_says_devices_and_memory_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    auto = [
        word for section in ("rollout", "teacher", "learner", "eval") for word in ("--set", f"{section}.device=auto")
    ]
    assert main(["check", str(EXPERIMENTS / "demo.yaml"), *auto, "--gpus", "2", "--gpu-gb", "24"]) == 0
    told = capsys.readouterr().out
    assert "devices    2 GPUs: learner cuda:0, teacher-0 cuda:1" in told
    assert "memory     learner on cuda:0: at most " in told
    assert " of 24.0 GB if all are at their peak" in told
    assert "unchecked" not in told


# --- docs/scaling.md --------------------------------------------------------------------------------------------------


def test_the_table_of_the_docs_is_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines() == scaling_table()
    assert told in (ROOT / "docs" / "scaling.md").read_text(), "run: katana scaling"


def test_the_memory_of_gpus_is_that_of_the_ones_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXPERIMENTS / "demo.yaml"), "--gpu-gb", "24"]) == 2
    assert "--gpu-gb is the memory of each of the GPUs that --gpus names: give both" in capsys.readouterr().err
