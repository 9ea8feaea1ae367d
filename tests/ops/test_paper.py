"""The paper's grid: eight configs that differ in name, student and policy alone, tried on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from data_sets import put_paper_data, put_tiny_qwen3

from ops.cli.main import main

GRID = sorted((Path(__file__).parents[2] / "ops" / "experiments" / "paper").glob("*.yaml"))
POLICIES = ("none", "fixed", "random", "kat")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("models")
    student, teacher = put_tiny_qwen3(folder / "student", seed=1), put_tiny_qwen3(folder / "teacher", seed=2)
    return "--set", f"student.model={student}", "--set", f"teacher.model={teacher}"


def test_the_grid_is_whole_and_differs_in_nothing_else() -> None:
    trees: list[dict[str, Any]] = [yaml.safe_load(path.read_text()) for path in GRID]
    cells = {(tree["student"].pop("model"), tree["termination"].pop("policy")) for tree in trees}
    students = {student for student, _ in cells}
    assert len(students) == 2
    assert cells == {(student, policy) for student in students for policy in POLICIES}
    assert len({tree.pop("name") for tree in trees}) == len(trees) == 8
    assert all(tree == trees[0] for tree in trees)
    benchmarks = trees[0]["eval"]["data"]
    assert set(benchmarks) == {"amc", "math500", "minervamath", "aime24"}
    assert {one.get("k", trees[0]["eval"]["k"]) for one in benchmarks.values()} == {8, 32}


@pytest.mark.parametrize("path", GRID, ids=lambda path: path.stem)
def test_check_accepts_it_with_tiny_models(
    path: Path,
    models: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    put_paper_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    devices = [f"{section}.device=cpu" for section in ("rollout", "teacher", "learner", "eval")]  # no GPU may be here
    assert main(["check", str(path), *models, *(part for item in devices for part in ("--set", item))]) == 0
    told = capsys.readouterr().out
    assert "prompts    8 rows of data/dapo-math-17k, judged by math-verify" in told
    assert "benchmark  amc: 1 of 1 rows of data/amc23, 32 samples each" in told
    assert "benchmark  math500: 1 of 1 rows of data/math500, 8 samples each" in told
    assert "unchecked" not in told
