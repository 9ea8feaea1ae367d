"""One run of real processes that several modules ask about.

A Prometheus sees it from its beginning, `katana top` and `katana watch` look at it in its middle; what its processes
unpickle is written down.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import DEMO, SMALL, finish, start, wait_for_steps

from common.config import Config, load
from ops.live.top import top
from ops.live.watch import watch

RULES = DEMO.parents[1] / "prometheus"
NAME = "whole"
STEPS, EVALUATED_EVERY = 18, 6
SETTINGS = (
    *SMALL,
    f"learner.max_steps={STEPS}",
    "termination.window=16",
    "termination.patience=4",
    "termination.grace_tokens=0",
    "termination.stride=1",
    f"eval.every_steps={EVALUATED_EVERY}",
    "feeder.record_audit=true",
    "data.num_generations=4",
    "reward.mode=grpo",
    "reward.weight=0.1",
    "trace=true",
)
# In front of every Python process of the run, and so in what is forked from one: writes down each class that an
# unpickler looks up, and who asked.
_HOOK = """
import atexit, os, sys, traceback

def _hook(event, arguments):
    if event == "pickle.find_class":
        asked = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()[:-1]]
        line = "\\t".join([" ".join(sys.argv[1:2]), f"{arguments[0]}.{arguments[1]}", *reversed(asked)]) + "\\n"
        with open(os.environ["KATANA_TEST_UNPICKLED"], "a") as log:
            log.write(line)

def _note():
    with open(os.environ["KATANA_TEST_UNPICKLED"], "a") as log:
        log.write("\\t".join(["started", *sys.argv[1:2]]) + "\\n")

sys.addaudithook(_hook)
_note()
os.register_at_fork(after_in_child=lambda: atexit.register(_note))  # a role is forked before it has its command line
"""


@dataclass(frozen=True)
class WholeRun:
    """The run when it is over, and what was seen of it before."""

    folder: Path
    output: str
    prometheus: str | None  # address of the server that saw it; None where none is installed
    unpickled: list[list[str]]  # fields of a line of the hook
    middle: dict[str, Any]  # `katana top` after three steps
    verdict: dict[str, Any]  # `katana watch` of the newest verdict there
    followed: dict[str, Any]  # `katana watch --follow` of a rollout that was not over

    @property
    def config(self) -> Config:
        return load(self.source)

    @property
    def source(self) -> Path:
        return self.folder / "config.yaml"


def observe(place: Path) -> Iterator[WholeRun]:
    """Start Prometheus and the run, look at it, wait for its end. Prometheus answers until the generator is closed."""
    (place / "hook").mkdir()
    (place / "hook" / "sitecustomize.py").write_text(_HOOK)
    log, folder = place / "unpickled", place / "runs" / NAME
    hooked = {"PYTHONPATH": str(place / "hook"), "KATANA_TEST_UNPICKLED": str(log)}
    with _prometheus(place) as url:
        process = start(folder.parent, name=NAME, settings=SETTINGS, environment=hooked)
        try:
            wait_for_steps(folder, 3, process, timeout_s=240)
            middle, verdict, followed = _look(folder / "config.yaml")
        finally:
            code, output = finish(process)
        assert code == 0, output
        unpickled = [line.split("\t") for line in log.read_text().splitlines()]
        yield WholeRun(folder, output, url, unpickled, middle, verdict, followed)


def _look(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    config = load(source)
    middle = snapshot(config, source)
    verdict = watched(config, source, middle["verdicts"][0]["rid"])
    # One that is admitted now is followed to its verdict.
    newest = str(snapshot(config, source)["ledger"]["admitted"] - 1)
    return middle, verdict, watched(config, source, newest, follow=True)


def snapshot(config: Config, source: Path) -> dict[str, Any]:
    """What `katana top --once --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert top(config, source, interval_s=1.0, once=True, as_json=True) == 0
    [line] = out.getvalue().splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


def watched(config: Config, source: Path, rid: str, *, follow: bool = False) -> dict[str, Any]:
    """The last line that `katana watch --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert watch(config, source, rid, as_json=True, follow=follow) == 0
    value: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    return value


# --- Prometheus ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _prometheus(place: Path) -> Iterator[str | None]:
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    config, port, log = _adapted(place), _free_port(), place / "prometheus.log"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={place / 'data'}"]
    with log.open("wb") as file:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=file, stderr=file)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _adapted(place: Path) -> Path:
    """ops/prometheus/local.yml with other intervals and another runs folder, and the shipped rules beside it."""
    config = yaml.safe_load((RULES / "local.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "900ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / pattern) for pattern in config["rule_files"]]
    found = 0
    for job in config["scrape_configs"]:
        for files in job.get("file_sd_configs", []):
            assert all(path.startswith("../../runs/") for path in files["files"])
            files["files"] = [path.replace("../../runs", str(place / "runs")) for path in files["files"]]
            files["refresh_interval"] = "1s"
            found += 1
    assert found, "local.yml finds no processes by file"
    path = place / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"Prometheus was not ready within 30 s:\n{log.read_text()}")
