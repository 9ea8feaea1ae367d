"""Children of a command: started apart from it, ended together, killed where they do not end."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from common.pretrained import PACKAGE_ROOT
from ops.reach.children import end, katana, start

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
OBEDIENT = "import time; print('up', flush=True); time.sleep(60)"


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_child_writes_to_its_log_apart_from_us(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, sys; print(os.environ['WORD'], os.getsid(0) == os.getpid(), repr(sys.stdin.read()))"
    assert start([sys.executable, "-c", code], log, {"WORD": "x"}).wait(20) == 0
    assert log.read_text() == "before\nx True ''\n"
    assert start(katana("keys"), log, {"PYTHONPATH": str(PACKAGE_ROOT)}).wait(60) == 0
    assert "learner.max_steps" in log.read_text()


def test_all_are_told_to_end_and_what_stays_is_killed(tmp_path: Path) -> None:
    children = [start([sys.executable, "-c", code], tmp_path / "log") for code in (STUBBORN, OBEDIENT, "")]
    children[2].wait(20)
    wait_for(tmp_path / "log", "up\nup\n")
    began = time.monotonic()
    end(children, 0.5)
    assert [child.returncode for child in children] == [-signal.SIGKILL, -signal.SIGTERM, 0]
    assert time.monotonic() - began < 10
    end(children, 60)  # nothing is left to wait for


def test_who_is_told_again_does_not_wait(tmp_path: Path) -> None:
    child = start([sys.executable, "-c", STUBBORN], tmp_path / "log")
    wait_for(tmp_path / "log", "up\n")
    began = time.monotonic()
    end([child], 60, at_once=lambda: time.monotonic() > began + 0.2)
    assert child.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 20
