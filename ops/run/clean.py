"""`katana clean`: removes a run's folder and its keys in Redis."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config import Config, ConfigError, parse
from common.runfiles.run import lock, read_run_key
from common.wire.plane import open_plane
from ops.reach.left_over import left_by_harness
from ops.reach.server import reach


def clean(folder: Path) -> str:
    """Remove a run: its keys in the config's Redis, then its folder. Returns what was removed.

    For a run of the fault harness whose Redis is gone, only the folders. Raises ConfigError if the folder is not a
    run's, the run is running, or its Redis does not answer.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "run.json").is_file():
        raise ConfigError(f"{folder}: not a run's folder (config.yaml and run.json are not both there)")
    lock(folder).close()
    config = parse((folder / "config.yaml").read_bytes(), source=str(folder / "config.yaml"))
    gone, left = left_by_harness(folder, config)
    if gone:
        for path in filter(None, (folder, left)):
            shutil.rmtree(path)
        folders = f"{folder} and {left}" if left else f"{folder}"
        return f"removed {folders}. Its Redis, {config.redis.url}, was the fault harness's and is gone with its keys"
    removed = 0
    if config.redis.url is not None:
        removed = _remove_keys(config, read_run_key(folder))
    shutil.rmtree(folder)
    return f"removed {folder}" + (f" and {removed} keys in {config.redis.url}" if config.redis.url else "")


def _remove_keys(config: Config, run_key: str) -> int:
    client = reach(config)
    plane = open_plane(config, client, run_key)
    live = client.exists(*(plane.key(f"lease:{role}") for role in ("feeder", "arbiter", "learner")))
    if live:
        raise ConfigError(f"run {run_key}: its feeder, arbiter or learner is running; stop them first")
    removed = 0
    for key in client.scan_iter(match=plane.prefix.replace("[", r"\[") + "*", count=1000):
        removed += int(client.unlink(key))
    if client.hget("katana:runs", config.name) == run_key.encode():
        client.hdel("katana:runs", config.name)
    return removed
