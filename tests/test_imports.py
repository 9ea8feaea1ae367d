"""Imports run one way, and what must start fast starts without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "common": {"common"},
    "actors": {"actors", "common"},
    "learner": {"learner", "common"},
    "ops": {"ops", "actors", "learner", "common"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {top(module) for module in imported(path)} & set(ALLOWED)
    assert ours <= ALLOWED[package]
    assert "tests" not in {top(module) for module in imported(path)}


def test_only_the_command_line_and_the_harness_itself_import_the_harness() -> None:
    """What `katana run`, `dead` and `clean` need lies outside, and the harness imports it from there."""
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        if path.parent != ROOT / "ops" / "chaos" and any(f"{name}.".startswith("ops.chaos.") for name in imported(path))
    }
    assert found == {"ops/cli/main.py"}


def test_the_way_to_a_run_knows_only_common_and_the_runs_folder() -> None:
    """Everything in ops may use `ops.reach`, so it uses nothing of ops but the folder."""
    for path in (ROOT / "ops" / "reach").glob("*.py"):
        ours = {name for name in imported(path) if top(name) in ALLOWED}
        rest = {name for name in ours if not re.match(r"common\b|ops\.(reach|rundir)\b", name)}
        assert not rest, path


@pytest.mark.parametrize("path", [path for path in FILES if "common" in path.parts], ids=lambda path: path.name)
def test_common_knows_neither_torch_nor_celery(path: Path) -> None:
    assert not {top(module) for module in imported(path)} & {"torch", "celery", "kombu", "safetensors", "learner"}


@pytest.mark.parametrize("package", ["actors", "learner"])
def test_only_the_celery_app_and_ops_know_celery(package: str) -> None:
    found = {path.name for path in (ROOT / package).rglob("*.py") if "celery" in map(top, imported(path))}
    assert found <= {"app.py"}


def test_no_pickle_and_no_remote_code() -> None:
    for path in FILES:
        assert not {top(module) for module in imported(path)} & {"pickle", "cloudpickle", "dill", "joblib"}, path
        text = path.read_text()
        assert "trust_remote_code=True" not in text, path
        assert "yaml.load(" not in text, path


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "actors.arbiter",
        "actors.feeder",
        "actors.books",
        "ops.tasks.source",
        "ops.run.summary",
        "ops.run.roles",
        "ops.reach.run",
    ],
)
def test_module_starts_without_torch(module: str) -> None:
    found = modules_after(f"import {module}")
    assert module in found
    assert not {"torch", "transformers"} & found


def test_all_of_common_starts_without_torch_and_celery() -> None:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "common").rglob("*.py"))
    names = [".".join(path.parts) for path in paths if path.name != "__init__"]
    found = modules_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= found
    assert not {"torch", "transformers", "celery", "kombu"} & found
