"""Roles forked from the nursery: as processes of their own, and whatever happens to the nursery."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import make_config

from common.pretrained import PACKAGE_ROOT
from ops.reach.children import end
from ops.reach.embedded import EmbeddedRedis
from ops.run.nursery import Forked, Nursery

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# In front of the nursery: each fork of it tells, when it ends, what it was.
SHIM = """
import atexit, json, os, sys

most = 0  # threads of a process that forks

def count():
    global most
    most = max(most, len(os.listdir("/proc/self/task")))

def tell(before):
    import numpy, torch
    facts = {
        "pid": os.getpid(), "session": os.getsid(0), "argv": sys.argv[1:], "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"), "word": os.environ.get("WORD"), "stdin": sys.stdin.read(),
        "cuda": torch.cuda.is_initialized(), "draw": float(numpy.random.random()),
        "nvml": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"), "tasks": most,
        "shown": open("/proc/self/cmdline").read().split(chr(0)),
        "fresh": [name for name in sys.modules.keys() - before if name.partition(".")[0] in ("torch", "celery")],
    }
    print("facts", json.dumps(facts), flush=True)

def begin():
    atexit.unregister(tell)  # of the process in between
    atexit.register(tell, set(sys.modules))

os.register_at_fork(before=count, after_in_child=begin)
"""
# Forks an arbiter that waits for its run, then waits to be killed itself.
HOLDER = """
import sys, time
from pathlib import Path
from ops.run.nursery import Nursery
nursery = Nursery(Path(sys.argv[1]))
child = nursery.fork(["arbiter", sys.argv[1]], Path(sys.argv[2]), {}, 1)
while child.pid is None:
    child.poll()
    time.sleep(0.01)
print(nursery.pid, child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def nursery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    (tmp_path / "sitecustomize.py").write_text(SHIM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGE_ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # for the roles, which inherit it; not for the nursery
    with Nursery(tmp_path / "config.yaml") as nursery:
        yield nursery


@pytest.fixture
def waiting(tmp_path: Path, embedded_redis: EmbeddedRedis) -> list[str]:
    """The words of an arbiter whose run is never begun."""
    config = make_config(tmp_path, name="never", redis={"url": embedded_redis.url})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    return ["arbiter", str(tmp_path / "config.yaml")]


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def born(child: Forked) -> int:
    until(lambda: child.poll() is not None or child.pid is not None, "not born")
    assert child.pid is not None
    until(lambda: child.poll() is not None or child.ours, "not ours")
    return child.pid


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def facts_in(log: Path) -> dict[str, Any]:
    [line] = [line for line in log.read_text().splitlines() if line.startswith("facts ")]
    facts: dict[str, Any] = json.loads(line.removeprefix("facts "))
    return facts


def test_a_fork_is_what_a_process_of_that_command_is(nursery: Nursery, tmp_path: Path) -> None:
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    logs[0].write_text("before\n")
    children = [
        nursery.fork(["keys"], logs[0], {"OMP_NUM_THREADS": "2", "WORD": "x"}, 2),
        nursery.fork(["check", str(tmp_path / "none.yaml")], logs[1], {}, 1),
    ]
    assert [child.wait(120) for child in children] == [0, 2]
    first, second = map(facts_in, logs)
    text = logs[0].read_text()
    assert text.startswith("before\n") and "learner.max_steps" in text
    assert "error: " in logs[1].read_text()
    assert first["pid"] == first["session"] == children[0].pid
    assert first["shown"][1:4] == ["-m", "ops.cli", "keys"]
    assert second["shown"][1:5] == ["-m", "ops.cli", "check", str(tmp_path / "none.yaml")]
    assert [one["argv"] for one in (first, second)] == [["keys"], ["check", str(tmp_path / "none.yaml")]]
    assert (first["threads"], first["omp"], first["word"], first["stdin"]) == (2, "2", "x", "")
    assert (second["threads"], second["omp"], second["word"]) == (1, "7", None)
    for one in (first, second):
        assert one["fresh"] == []  # torch was there
        assert one["tasks"] == 1  # no thread was running at the fork
        assert not one["cuda"] and one["nvml"] is None
    assert first["draw"] != second["draw"]


def test_signals_come_through_and_so_do_their_codes(nursery: Nursery, waiting: list[str], tmp_path: Path) -> None:
    told, killed = (nursery.fork(waiting, tmp_path / f"{name}.log", {}, 1) for name in ("told", "killed"))
    pids = [born(told), born(killed)]
    killed.kill()
    time.sleep(1.0)  # until its handlers are there; before that SIGTERM ends it at once, as any process that starts
    end([told, killed], 30)
    assert told.returncode in (130, -signal.SIGTERM)
    assert killed.returncode == -signal.SIGKILL
    assert not any(map(alive, pids))


def test_the_death_of_the_nursery_touches_no_role_and_loses_no_request(
    nursery: Nursery, waiting: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    log = tmp_path / "role.log"
    before = nursery.fork(waiting, log, {}, 1)
    pid, first = born(before), nursery.pid
    os.kill(first, signal.SIGKILL)
    during = nursery.fork(["keys"], tmp_path / "during.log", {}, 1)  # it may be dead or not, the kill is just sent
    until(lambda: nursery.attend() or nursery.pid != first, "not started again")
    second = nursery.pid
    os.kill(second, signal.SIGKILL)  # while it imports
    assert during.wait(120) == 0
    assert "learner.max_steps" in (tmp_path / "during.log").read_text()
    assert nursery.pid not in (first, second)
    assert "the nursery exited with -9; restarted" in caplog.text
    assert alive(pid) and before.poll() is None
    os.kill(nursery.pid, signal.SIGKILL)
    nursery.close()  # the last one is dead, and not started again
    assert alive(pid)
    end([before], 30)
    assert before.returncode in (130, -signal.SIGTERM)


def test_what_is_not_born_is_not_waited_for(nursery: Nursery, tmp_path: Path) -> None:
    """The command is interrupted while the nursery still imports."""
    child = nursery.fork(["keys"], tmp_path / "keys.log", {}, 1)
    nursery.close()
    began = time.monotonic()
    end([child], 60)
    assert child.returncode == -signal.SIGTERM and time.monotonic() - began < 30
    assert (tmp_path / "keys.log").read_text() == ""


def test_a_nursery_that_cannot_come_up_is_given_up_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; print('no memory', flush=True); os._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Nursery(tmp_path / "config.yaml") as nursery:
        child = nursery.fork(["keys"], tmp_path / "keys.log", {}, 1)
        with pytest.raises(RuntimeError, match="6 times in a row: no memory"):
            child.wait(60)


def test_a_nursery_that_was_ready_may_die_any_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ready soon, since nothing heavy can be imported: then the roles that need it fail, and only they."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules |= dict.fromkeys(('torch', 'transformers'))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGE_ROOT}")
    with Nursery(tmp_path / "config.yaml") as nursery:
        for _ in range(7):
            before = nursery.pid
            until(lambda: nursery.attend() or nursery.ready, "not ready")
            os.kill(before, signal.SIGKILL)
            until(lambda before=before: nursery.attend() or nursery.pid != before, "not started again")
        assert nursery.fork(["keys"], tmp_path / "keys.log", {}, 1).wait(60) == 0
        assert nursery.fork(["learner", "none.yaml"], tmp_path / "learner.log", {}, 1).wait(60) == 2


def test_roles_and_nursery_end_with_the_command(waiting: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, waiting[1], str(tmp_path / "role.log")]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout is not None
    pids = list(map(int, holder.stdout.readline().split()))
    assert len(pids) == 2 and all(map(alive, pids))
    holder.kill()
    holder.communicate()
    until(lambda: not any(map(alive, pids)), "left behind")
