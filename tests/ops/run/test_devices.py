"""Devices that this machine does not have are refused before anything starts."""

from __future__ import annotations

import pytest
import torch

from common.config import ConfigError, load
from common.pretrained import PACKAGE_ROOT
from ops.run.check import check
from ops.run.devices import problem_with
from ops.run.local import run_locally
from ops.run.roles import run_role

DEMO = PACKAGE_ROOT / "ops" / "experiments" / "demo.yaml"
NONE_HERE = "cuda:9" if torch.cuda.is_available() else "cuda"


def test_the_cpu_is_available() -> None:
    assert problem_with("cpu") is None
    assert problem_with("cpu:0") is None


@pytest.mark.parametrize("device", ["cude", "cuda:x", "", "cpu:1", "cuda:99", NONE_HERE, "meta"])
def test_a_device_that_torch_does_not_have_is_reported_with_the_allowed_ones(device: str) -> None:
    problem = problem_with(device)
    assert problem is not None
    assert problem.startswith(repr(device))
    assert "allowed here: cpu" in problem


@pytest.mark.parametrize("key", ["rollout", "teacher", "learner", "eval"])
def test_check_names_the_key(key: str) -> None:
    problems = check(load(DEMO, [f"{key}.device=cude"])).problems
    assert [problem.partition(":")[0] for problem in problems] == [f"{key}.device"]


def test_check_leaves_a_missing_device_unchecked_and_a_run_refuses_it() -> None:
    config = load(DEMO, [f"learner.device={NONE_HERE}"])
    found = check(config)
    assert found.problems == []
    assert [line.partition(":")[0] for line in found.unchecked] == ["learner.device"]
    with pytest.raises(ConfigError, match=r"^learner\.device"):
        run_locally(config, None, resume=False, fresh=False)


@pytest.mark.parametrize(
    ("role", "key"),
    [("rollout", "rollout"), ("teacher", "teacher"), ("learner", "learner"), ("evaluator", "eval")],
)
def test_a_role_by_itself_refuses_its_own_device(role: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}\.device: 'cude'"):
        run_role(role, load(DEMO, [f"{key}.device=cude", "redis.url=redis://127.0.0.1:1/0"]))
