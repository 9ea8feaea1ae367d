"""Folders of the user's own that are called as our packages are do no harm: through the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import own_packages
from ops.cli.main import main

ROOT = Path(__file__).parents[2]
KATANA = Path(sys.executable).parent / "katana"
POLICY = """
from common.policies import Policy
from common.termination import Cut, FixedLength

class Mine(FixedLength, Policy):
    def __init__(self, settings, situation):
        super().__init__(int(settings.options["tokens"]), "mine")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a YAML, and beside it four packages that end whoever imports them."""
    folder = tmp_path / "project"
    for name in own_packages.NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the {name} of the user')\n")
    (folder / "ops" / "policy.py").write_text(POLICY)
    text = (ROOT / "ops" / "experiments" / "demo.yaml").read_text()
    (folder / "my.yaml").write_text(text)
    return folder


def run(*command: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """A command of this checkout, whatever is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


BY_FILE = ("--set", "termination.policy=ops/policy.py:Mine", "--set", "termination.options={tokens: 5}")


@pytest.mark.slow
def test_the_command_sees_none_of_them(project: Path) -> None:
    done = run(KATANA, "check", "my.yaml", *BY_FILE, cwd=project)
    assert done.returncode == 0, done.stderr
    assert f"policy     {project}/ops/policy.py:Mine" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "."])
def test_nor_does_a_process_that_has_the_working_directory_on_its_path(project: Path, path: str) -> None:
    """All but `ops`: where another one is found in its stead nothing of ours is asked."""
    (project / "ops").rename(project / "policies")
    module = (sys.executable, "-m", "ops.cli")
    done = run(*([KATANA] if path else module), "check", "my.yaml", cwd=project, path=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_worker_that_celery_starts_sees_none_of_them(project: Path) -> None:
    (project / "actors").rename(project / "mine")
    done = run(sys.executable, "-m", "celery", "-A", "actors.app", "report", cwd=project)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_starts_its_roles_past_them_and_finds_the_policy_again_from_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"runs_dir={tmp_path}/runs", "learner.max_steps=1", "eval.every_steps=0", "learner.batch_size=8"]
    sets = [part for one in small for part in ("--set", one)]
    done = run(KATANA, "run", "my.yaml", *BY_FILE, *sets, cwd=project)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "demo"
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert "mine" in {line["finish_reason"] for line in lines}
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(folder / "config.yaml")]) == 0
    assert f"policy     {project}/ops/policy.py:Mine" in capsys.readouterr().out
    assert main(["replay", str(folder)]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "from common.mine import x",
            "No module named 'common.mine', policy.py line 1); 'common' is a package of Katana",
        ),
        ("1 / 0", "the file fails when it is imported (ZeroDivisionError: division by zero, policy.py line 1)"),
        ("", "the file has no such class"),
    ],
)
def test_what_cannot_be_is_said(
    project: Path, text: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "ops" / "policy.py").write_text(text)
    monkeypatch.chdir(project)
    assert main(["check", "my.yaml", *BY_FILE]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_that_would_have_to_lie_in_a_package_of_ours_is_refused_in_words(project: Path) -> None:
    done = run(KATANA, "check", "my.yaml", "--set", "termination.policy=ops.policy:Mine", cwd=project)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "'ops' is a package of Katana: give yours another name" in done.stderr
    assert "be named by its file, path/to/file.py:Mine" in done.stderr


def test_children_look_where_we_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != ""])
    monkeypatch.setenv("PYTHONPATH", f"a{os.pathsep}/b")
    assert own_packages.environment()["PYTHONPATH"] == f"{tmp_path}/a{os.pathsep}/b"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert own_packages.environment()["PYTHONPATH"] == f"{tmp_path}{os.pathsep}{tmp_path}/a{os.pathsep}/b"
    monkeypatch.delenv("PYTHONPATH")
    assert own_packages.environment()["PYTHONPATH"] == str(tmp_path)
    assert own_packages.environment()["PYTHONSAFEPATH"] == "1"
