"""Imports run one way, and what must start fast starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    # package → the packages that it may import, beside itself; from the ground floor up
    "common": (),
    "actors": ("common",),
    "learner": ("common", "actors"),  # the engine's adapters: learner and workers merge alike
    "ops": ("common",),
    "ops.tasks": (),
    "ops.stats": (),
    "ops.plots": (),
    "ops.words": (),
    "ops.reach": (),
    "ops.reading": ("ops.tasks",),
    "ops.monitoring": ("ops.plots",),
    "ops.live": ("ops.reading", "ops.reach", "ops.stats"),
    "ops.report": ("ops.reading", "ops.plots", "ops.stats", "ops.words"),
    "ops.trace": ("ops.plots",),
    "ops.audit": ("ops.report", "ops.tasks", "ops.plots", "ops.stats", "ops.words"),
    "ops.replay": ("ops.report", "ops.tasks", "ops.plots", "ops.stats", "ops.words"),
    "ops.run": ("ops.report", "ops.reading", "ops.tasks", "ops.reach", "ops.stats"),
    "ops.compare": ("ops.run", "ops.report", "ops.reach", "ops.plots", "ops.stats", "ops.words"),
    "ops.bench": ("ops.run", "ops.tasks", "ops.reach"),
    "ops.chaos": ("ops.run", "ops.reach", "ops.plots"),
    "ops.cli": (
        *("ops.tasks", "ops.monitoring", "ops.live", "ops.report", "ops.trace", "ops.audit", "ops.replay"),
        *("ops.run", "ops.compare", "ops.bench", "ops.chaos"),
    ),
}
BELOW_OPS = ("common", "actors", "learner")
OURS = {*BELOW_OPS, "ops"}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


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


def package_of(module: str) -> str:
    """`common`, `actors`, `learner`, or a package or single module of ops."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ops" and len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    package = package_of(module_of(path))
    allowed = {package, *FLOORS[package], *(BELOW_OPS if package.startswith("ops.") else ())}
    ours = {package_of(name) for name in imported(path) if top(name) in OURS}
    assert ours <= allowed
    assert "tests" not in {top(module) for module in imported(path)}


def test_the_floors_have_no_circle() -> None:
    built: set[str] = set()
    for package, below in FLOORS.items():
        assert set(below) <= built, package
        built.add(package)


def test_no_two_modules_import_each_other() -> None:
    """Not even in a circle of several, nor inside a function."""
    names = {module_of(path): path for path in FILES}
    needs = {
        module: {
            name for name in imported(path) if name in names and name != module and names[name].name != "__init__.py"
        }
        for module, path in names.items()
        if path.name != "__init__.py"
    }
    while ready := [module for module, below in needs.items() if not below & needs.keys()]:
        for module in ready:
            del needs[module]
    assert not needs


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


def test_the_help_of_the_command_line_starts_without_torch() -> None:
    found = modules_after("from ops.cli.main import command_line\ncommand_line().format_help()")
    assert "ops.cli.faults" in found
    assert not {"torch", "transformers", "celery", "redis", "matplotlib", "numpy"} & found


def test_all_of_common_starts_without_torch_and_celery() -> None:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "common").rglob("*.py"))
    names = [".".join(path.parts) for path in paths if path.name != "__init__"]
    found = modules_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= found
    assert not {"torch", "transformers", "celery", "kombu"} & found
