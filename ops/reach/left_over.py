"""What the fault harness leaves of a run: marks by which it is recognised, and a folder beside the run's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from common.config import Config, ConfigError, parse
from common.runfiles.names import CHAOS, CONFIG, RUN, SOAK

SOCKETS = "katana-"  # how the temporary folder of a harness's socket begins


def harness_folder(folder: Path) -> Path:
    """Where the harness keeps what is its own: outside a run's folder, since a fresh run wants an empty one."""
    return folder.with_name(f"{folder.name}.redis")


def left_by_harness(folder: Path, config: Config) -> tuple[bool, Path | None]:
    """Whether a run was the harness's, and that has ended with the Redis that it had brought; the folder that it left
    beside the run's, where that is still there.

    Such a run's Redis will not come back, another's may merely be away. The harness uses sockets of its own in a
    temporary folder, each for one run, and leaves its marks: its results in the run's folder (which move with it), and
    beside it the config that it started the run by.
    """
    url = config.redis.url or ""
    address = Path(url.removeprefix("unix://").partition("?")[0])
    its_own = url.startswith("unix://") and address.parent.name.startswith(SOCKETS)
    if not its_own or _answers(address):
        return False, None
    left: Path | None = harness_folder(folder)
    if not _names(harness_folder(folder), url):
        left = None
    marked = any((folder / name).is_file() for name in (CHAOS, SOAK))
    return marked or left is not None, left


def _names(folder: Path, url: str) -> bool:
    """Whether the harness's folder is that of the run on this Redis (and no run's folder, whatever its name)."""
    path = folder / CONFIG
    if not path.is_file() or (folder / RUN).exists():
        return False
    try:
        return parse(path.read_bytes(), source=str(path)).redis.url == url
    except ConfigError:
        return False


def _answers(address: Path) -> bool:
    """Whether a process listens on a Unix socket; True if this process may not connect."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(os.fspath(address))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True
