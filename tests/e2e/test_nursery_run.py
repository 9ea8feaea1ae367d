"""A run whose nursery is killed, and with it a role: it goes on. What the roles import by themselves is little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from real_runs import SMALL, check_books, children_of, finish, start, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# In front of the nursery: each role notes, when it ends, what it imported after the fork.
SHIM = """
import atexit, os, sys

def note(before):
    with open(f"{os.environ['KATANA_TEST_IMPORTED']}/{os.getpid()}", "w") as file:
        print(*sys.argv[1:2], *sorted(sys.modules.keys() - before), file=file)

def begin():
    atexit.unregister(note)  # of the process in between
    atexit.register(note, set(sys.modules))

os.register_at_fork(after_in_child=begin)
"""
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "celery", "kombu", "redis", "numpy", "learner", "actors"}
# Of `actors.app` itself, and of what libraries import at their first use.
BY_ITSELF = {"actors.app", "numpy.ctypeslib", "numpy.ctypeslib._ctypeslib", "numpy.rec", "numpy.strings"}
FEW = 12


def nursery_of(folder: Path) -> int | None:
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words[2:4] == [b"ops.cli.nursery", os.fsencode(folder / "config.yaml")]:
            return int(entry.name)
    return None


def test_a_run_goes_on_when_its_nursery_and_a_role_are_killed(tmp_path: Path) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "imported").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(SHIM)
    environment = {"PYTHONPATH": str(tmp_path / "shim"), "KATANA_TEST_IMPORTED": str(tmp_path / "imported")}
    folder = tmp_path / "e2e"
    process = start(tmp_path, settings=(*SMALL, "learner.max_steps=12"), environment=environment)
    wait_for_steps(folder, 2, process)
    before, first = children_of(folder), nursery_of(folder)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    os.kill(before["teacher"], signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (after := children_of(folder)).get("teacher", before["teacher"]) == before["teacher"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert {role: pid for role, pid in after.items() if role != "teacher"} == {
        role: pid for role, pid in before.items() if role != "teacher"
    }
    second = nursery_of(folder)
    assert second not in (None, first)
    code, output = finish(process)
    assert code == 0, output
    assert "the nursery exited with -9; restarted" in output
    assert "teacher-0 exited with -9; restarted" in output
    assert check_books(folder, 12)["ledger"]["dead"] == 0
    assert not children_of(folder) and nursery_of(folder) is None
    _check_imports(tmp_path / "imported")


def _check_imports(folder: Path) -> None:
    found = {}
    for path in folder.iterdir():
        role, *modules = path.read_text().split()
        heavy = {name for name in modules if name.partition(".")[0] in HEAVY and name not in BY_ITSELF}
        found[role] = heavy
    assert {"learner", "feeder", "arbiter", "rollout", "teacher", "evaluator"} <= found.keys()
    for role, heavy in found.items():
        assert len(heavy) <= FEW, (role, sorted(heavy))
        assert "torch" not in heavy and "transformers.modeling_utils" not in heavy, role
