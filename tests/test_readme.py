"""The README says what is: every config key with its default, and no path that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from common.config import RESUMABLE, keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_config_key_stands_in_the_readme_with_its_default_and_meaning() -> None:
    for name, default, meaning in keys():
        assert f"| `{name}` | {default} | {meaning} |" in README, f"run: katana keys --markdown ({name})"


def test_every_path_in_the_readme_exists() -> None:
    tree = re.findall(r"^\| `([a-z_0-9./]+)` \|", README, flags=re.MULTILINE)
    paths = [path for path in tree if "/" in path]
    assert len(paths) > 20
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    missing = [path for path in [*paths, *links] if not (ROOT / path).exists()]
    assert not missing


def test_every_module_has_a_caption_in_the_readmes_tree() -> None:
    captioned = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    for folder in ("common", "common/runfiles", "actors", "learner", "ops"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "__init__.py":
                assert path.stem in captioned, f"{path.relative_to(ROOT)} has no caption"


def test_resumable_keys_are_keys() -> None:
    assert {name for name, _, _ in keys()} >= RESUMABLE


def test_no_machine_s_path_in_tracked_text() -> None:
    for pattern in ("*.md", "*.py", "*.yaml", "*.toml", "Makefile"):
        for path in ROOT.rglob(pattern):
            if ".venv" not in path.parts and "runs" not in path.parts:
                assert "/" + "work/" not in path.read_text(), path
