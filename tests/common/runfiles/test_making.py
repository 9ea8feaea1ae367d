"""A run's folder: created, resumed, moved aside, locked by one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from samples import make_config

from common.config import ConfigError, load
from common.files import write_json, write_text
from common.pretrained import PACKAGE_ROOT
from common.runfiles.making import lock, move_aside, open_folder, versions
from common.runfiles.run import read_json


def test_a_new_run_has_its_config_its_id_and_the_versions(tmp_path: Path) -> None:
    config = make_config(tmp_path / "runs")
    run_key = open_folder(config, resume=False)
    assert re.fullmatch(r"test-[0-9a-f]{8}", run_key)
    assert load(config.run_dir / "config.yaml") == config
    found = json.loads((config.run_dir / "run.json").read_text())
    assert found["run_key"] == run_key
    assert found["versions"]["redis"] == version("redis")
    assert set(found["versions"]) >= {"python", "torch", "transformers", "celery", "katana", "commit"}


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    run_key = open_folder(config, resume=False)
    before = (config.run_dir / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"exists already\. To continue it: --resume"):
        open_folder(config, resume=False)
    assert (config.run_dir / "run.json").read_bytes() == before
    assert run_key in before.decode()


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.run_dir.mkdir()
    assert open_folder(config, resume=False).startswith("test-")


def test_resuming_keeps_the_id_and_records_what_changed(tmp_path: Path) -> None:
    before = make_config(tmp_path)
    run_key = open_folder(before, resume=False)
    after = make_config(tmp_path, learner={"max_steps": 7})
    assert open_folder(after, resume=True) == run_key
    assert load(before.run_dir / "config.yaml").learner.max_steps == 7


def test_a_change_that_the_record_forbids_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    before = make_config(tmp_path)
    open_folder(before, resume=False)
    with pytest.raises(ConfigError, match=r"learner\.batch_size: 32 cannot become 3"):
        open_folder(make_config(tmp_path, learner={"batch_size": 3}), resume=True)
    assert load(before.run_dir / "config.yaml") == before


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_folder(config, resume=True)
    assert not config.run_dir.exists()
    open_folder(config, resume=False)
    for damaged in ("", "{"):
        (config.run_dir / "run.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"run\.json"):
            open_folder(config, resume=True)
    (config.run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.json"):
        open_folder(config, resume=True)


def test_a_fresh_run_moves_the_earlier_one_aside(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    keys = [open_folder(config, resume=False, fresh=True) for _ in range(3)]
    assert len(set(keys)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "test.1", "test.2"]
    found = [read_json(tmp_path / name / "run.json")["run_key"] for name in ("test.1", "test.2", "test")]
    assert found == keys


def test_the_folder_of_a_running_run_is_not_moved(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    open_folder(config, resume=False)
    with lock(config.run_dir):
        with pytest.raises(ConfigError, match="is running in this folder"):
            move_aside(config.run_dir)
        with pytest.raises(ConfigError, match="is running in this folder"):
            lock(config.run_dir)
        # Another process gets the same error.
        code = f"from pathlib import Path; from common.runfiles.making import lock; lock(Path({str(config.run_dir)!r}))"
        command = [sys.executable, "-c", code]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=PACKAGE_ROOT)
        assert refused.returncode != 0
        assert "is running in this folder" in refused.stderr
    assert move_aside(config.run_dir) == tmp_path / "test.1"


def test_files_are_written_atomically(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "text ü")
    write_json(tmp_path / "b", {"x": 1})
    assert (tmp_path / "a").read_text() == "text ü"
    assert read_json(tmp_path / "b") == {"x": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(ConfigError, match="absent: cannot be read"):
        read_json(tmp_path / "absent")


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", versions()["commit"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions()["commit"] == "unknown"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout


def installed(site: Path) -> None:
    """A copy of what `versions` needs, as pip installs it: packages and metadata, no pyproject.toml."""
    shutil.copytree(PACKAGE_ROOT / "common", site / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "ops").mkdir()
    shutil.copy(PACKAGE_ROOT / "ops" / "__init__.py", site / "ops")
    (site / "katana_distill-9.8.7.dist-info").mkdir()
    (site / "katana_distill-9.8.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: katana-distill\nVersion: 9.8.7\n"
    )


def versions_of(site: Path, **environment: str) -> dict[str, str]:
    code = "import json, common.runfiles.making; print(json.dumps(common.runfiles.making.versions()))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)} | environment,
    )
    found: dict[str, str] = json.loads(answer.stdout)
    return found


@pytest.mark.slow
def test_a_repository_around_an_installed_copy_is_not_katanas(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project")
    site = tmp_path / "site-packages"
    installed(site)
    found = versions_of(site)
    assert (found["katana"], found["commit"]) == ("9.8.7", "unknown")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert versions_of(site)["commit"] == "unknown"
    shutil.copy(PACKAGE_ROOT / "pyproject.toml", site)  # a source tree, but vendored: the repository is the other's
    assert versions_of(site)["commit"] == "unknown"
    git(site, "init", "-q")
    git(site, "commit", "-q", "--allow-empty", "-m", "Katana")
    own, other = git(site, "rev-parse", "HEAD").strip(), git(tmp_path, "rev-parse", "HEAD").strip()
    assert own != other
    assert versions_of(site)["commit"] == own
    assert versions_of(site, GIT_DIR=str(tmp_path / ".git"))["commit"] == own
    (site / "pyproject.toml").write_text('[project]\nname = "another"\n')  # the root of one that copied the packages
    assert versions_of(site)["commit"] == "unknown"
