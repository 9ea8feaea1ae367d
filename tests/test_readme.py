"""The documents say what is: every config key with its default, every package, and no path that is not there."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from common.config import keys, parse

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


def test_the_readme_s_config_is_one() -> None:
    block = text("README.md").partition("## A config\n")[2].partition("`katana check mine.yaml`")[0]
    config = parse(block)
    assert (config.name, config.teacher.device, config.termination.policy) == ("mine", "cuda:1", "kat")


def test_every_config_key_is_described_with_its_default_and_meaning() -> None:
    described = text("docs/configuration.md")
    for name, default, meaning in keys():
        assert f"| `{name}` | {default} | {meaning} |" in described, f"run: katana keys --markdown ({name})"
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \|", described, flags=re.MULTILINE)
    assert set(rows) == {name for name, _, _ in keys()}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", written) if not link.startswith("http")]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    rows = re.findall(r"^\| `([a-z_0-9./-]+)` \|", written, flags=re.MULTILINE)
    paths = [path for path in rows if path.startswith(("common/", "actors/", "learner/", "ops/", "tests/", "docs/"))]
    assert not [path for path in paths if not (ROOT / path).exists()]


def modules() -> list[Path]:
    return [path for folder in ("common", "actors", "learner", "ops") for path in (ROOT / folder).rglob("*.py")]


def test_every_module_says_in_its_first_line_what_it_holds() -> None:
    for path in [*modules(), *(ROOT / "benchmarks").glob("*.py")]:
        caption = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert caption and len(caption.splitlines()[0]) > 20, path


def test_every_package_is_described() -> None:
    described = text("docs/development.md")
    for folder in {path.parent.relative_to(ROOT) for path in modules() if (path.parent / "__init__.py").exists()}:
        assert str(folder) == "ops" or f"| `{folder}/` |" in described, folder


def test_every_file_of_a_run_and_every_field_of_its_records_is_described() -> None:
    from common.runfiles import names, records
    from common.runfiles.fields import Record

    described = text("docs/run-folder.md")
    files = [value for name, value in vars(names).items() if name.isupper()]
    assert not [name for name in files if f"`{name}`" not in described and f"`{name}/`" not in described]
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type) and issubclass(kind, Record)]
    stored = {one.metadata.get("name") or one.name for kind in kinds if kind is not Record for one in fields(kind)}
    assert len(kinds) > 15
    assert not [name for name in stored - {"scores"} if f"`{name}`" not in described]


def test_no_machine_s_path_in_tracked_text() -> None:
    for pattern in ("*.md", "*.py", "*.yaml", "*.toml", "Makefile"):
        for path in ROOT.rglob(pattern):
            if not any(part == "runs" or part.startswith(".venv") for part in path.parts):
                assert "/" + "work/" not in path.read_text(), path
