"""`katana clean`: removes a run's folder and its keys in Redis."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config import Config, ConfigError, parse
from common.runfiles.making import lock
from common.runfiles.names import CONFIG, RUN
from common.runfiles.run import RunFolder
from common.wire.plane import RUNS
from common.wire.planes import check_places, open_planes
from ops.reach.left_over import left_by_harness
from ops.reach.server import reach

_LEASES = ("lease:feeder", "lease:arbiter", "lease:learner")


def clean(folder: Path) -> str:
    """Remove a run: its keys in the config's Redis, then its folder. Returns what was removed.

    For a run of the fault harness whose Redis is gone, only the folders. Raises ConfigError if the folder is not a
    run's, the run is running, or its Redis does not answer.
    """
    if not (folder / CONFIG).is_file() or not (folder / RUN).is_file():
        raise ConfigError(f"{folder}: not a run's folder ({CONFIG} and {RUN} are not both there)")
    lock(folder).close()
    config = parse((folder / CONFIG).read_bytes(), source=str(folder / CONFIG))
    gone, left = left_by_harness(folder, config)
    if gone:
        for path in filter(None, (folder, left)):
            shutil.rmtree(path)
        folders = f"{folder} and {left}" if left else f"{folder}"
        return f"removed {folders}. Its Redis, {config.redis.url}, was the fault harness's and is gone with its keys"
    removed = 0
    if config.redis.url is not None:
        removed = _remove_keys(config, RunFolder(folder).run_key)
    shutil.rmtree(folder)
    servers = ", ".join(config.redis.servers)
    return f"removed {folder}" + (f" and {removed} keys in {servers}" if servers else "")


def _remove_keys(config: Config, run_key: str) -> int:
    plane = open_planes(config, reach(config), run_key)
    check_places(config, plane)
    if any(part.client.exists(*map(part.key, _LEASES)) for part in plane.parts):
        raise ConfigError(f"run {run_key}: its feeder, arbiter or learner is running; stop them first")
    removed = 0
    for part in plane.parts:
        for key in part.client.scan_iter(match=plane.prefix.replace("[", r"\[") + "*", count=1000):
            removed += int(part.client.unlink(key))
        if part.client.hget(RUNS, config.name) == run_key.encode():
            part.client.hdel(RUNS, config.name)
    return removed
