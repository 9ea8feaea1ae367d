"""TRL's own Python environment beside this file: made once, with Katana's build of torch and pinned versions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from sides import SideFailed

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / ".venv-trl"
TRL = "trl==1.16.*"
_READY = ".ready"


class EnvironmentFailed(SideFailed):
    """The environment cannot be made."""


def requirements() -> list[str]:
    """torch's build is named in full (2.13.0+cpu): a bare version may bring gigabytes of CUDA, and another speed."""
    return [f"torch=={version('torch')}", TRL]


def python_of(folder: Path = FOLDER) -> Path:
    """The environment's Python; makes the environment if it is missing or is for other requirements.

    Needs the network, and a few minutes, once. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS …) apply. Raises
    EnvironmentFailed.
    """
    wanted, ready = "\n".join([sys.version, *requirements(), ""]), folder / _READY
    python = folder / "bin" / "python"
    if ready.is_file() and ready.read_text() == wanted and python.exists():
        return python
    print(f"making {folder} with {', '.join(requirements())}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), *requirements()],
    ):
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise EnvironmentFailed(f"{' '.join(command)} failed (above); TRL's environment needs the network once")
    ready.write_text(wanted)
    return python
