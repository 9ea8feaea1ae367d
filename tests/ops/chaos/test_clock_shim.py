"""The clock shim shifts the wall clock of one running process, and does nothing that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ops.chaos

SHIM = Path(ops.chaos.__file__).parent / "shim"

# How far each clock of the process is ahead of the system's, a line for each line that comes in.
CLOCKS = """
import sys, time
from datetime import datetime
from time import time as imported, time_ns
for line in sys.stdin:
    real, steady = time.clock_gettime(time.CLOCK_REALTIME), time.clock_gettime(time.CLOCK_MONOTONIC)
    print(time.time() - real, imported() - real, time_ns() / 1e9 - real, time.monotonic() - steady,
          time.perf_counter() - steady, datetime.now().timestamp() - real, flush=True)
"""


class Process:
    def __init__(self, code: str, clocks: Path | None, *path: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "KATANA_CHAOS_CLOCK"}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [SHIM, *path]))
        if clocks is not None:
            environment["KATANA_CHAOS_CLOCK"] = str(clocks)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def clocks(self) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float(word) for word in self.process.stdout.readline().split()]

    def is_ahead(self, seconds: float) -> None:
        """Within the 0.2 s and a little, the wall clock is this far ahead, and no other clock ever is."""
        deadline = time.monotonic() + 2.0
        while True:
            *wall, steady, counter, date = self.clocks()
            assert max(abs(steady), abs(counter), abs(date)) < 0.2
            if all(abs(ahead - seconds) < 0.2 for ahead in wall):
                return
            assert time.monotonic() < deadline, wall
            time.sleep(0.05)


@pytest.fixture
def begin() -> Iterator[Callable[..., Process]]:
    begun: list[Process] = []

    def start(code: str, clocks: Path | None, *path: Path) -> Process:
        begun.append(Process(code, clocks, *path))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.communicate()


def test_the_clock_is_shifted_forth_and_back_while_the_process_runs(
    tmp_path: Path, begin: Callable[..., Process]
) -> None:
    one, other = begin(CLOCKS, tmp_path), begin(CLOCKS, tmp_path)
    file = tmp_path / str(one.process.pid)
    one.is_ahead(0)
    for seconds in (3600.0, -86400.5, 0.0, 7.25):
        file.write_text(f"{seconds}\n")
        one.is_ahead(seconds)
        other.is_ahead(0)
    file.unlink()
    one.is_ahead(0)


@pytest.mark.parametrize("content", [b"", b"soon", b"nan", b"-inf", b"1e999", b"\xff\xfe", b"1 2", None])
def test_what_is_no_number_shifts_nothing(tmp_path: Path, begin: Callable[..., Process], content: bytes | None) -> None:
    one = begin(CLOCKS, tmp_path)
    file = tmp_path / str(one.process.pid)
    file.write_text("100")
    one.is_ahead(100)
    file.unlink()
    if content is None:
        file.mkdir()  # cannot be read
    else:
        file.write_bytes(content)
    one.is_ahead(0)


def test_a_forked_child_has_its_own_clock(tmp_path: Path, begin: Callable[..., Process]) -> None:
    code = "import os, sys\nif os.fork():\n    os.wait()\n    sys.exit()\nprint(os.getpid(), flush=True)\n" + CLOCKS
    one = begin(code, tmp_path)
    assert one.process.stdout is not None
    child = int(one.process.stdout.readline())
    (tmp_path / str(one.process.pid)).write_text("50")
    one.is_ahead(0)
    (tmp_path / str(child)).write_text("-50")
    one.is_ahead(-50)


def run(code: str, *path: Path, **environment: str) -> str:
    base = {name: value for name, value in os.environ.items() if name != "KATANA_CHAOS_CLOCK"}
    search = {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=base | search | environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stderr == ""
    return done.stdout.strip()


def test_nothing_is_touched_or_imported_when_nobody_asks() -> None:
    assert run("import time; print(time.time, time.time_ns)", SHIM) == (
        "<built-in function time> <built-in function time_ns>"
    )
    modules = "import sys; print(*sorted(set(sys.modules) - {'sitecustomize'}))"
    assert run(modules, SHIM) == run(modules)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_sitecustomize_that_it_hides_is_run(tmp_path: Path, shifted: bool) -> None:
    """And the next one behind that is not: Python would not have run it either."""
    words = []
    for name in ("hidden", "behind"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            f"from time import time\nprint({name!r}, __name__, __file__, time.__name__)\n"
        )
        words.append(folder)
    clocks = {"KATANA_CHAOS_CLOCK": str(tmp_path)} if shifted else {}
    said = run("print('program')", tmp_path, SHIM, *words, **clocks)
    name = "shifted" if shifted else "time"
    assert said == f"hidden sitecustomize {words[0] / 'sitecustomize.py'} {name}\nprogram"


def test_two_that_chain_do_not_call_each_other_for_ever(tmp_path: Path) -> None:
    second, last = tmp_path / "second", tmp_path / "last"
    for folder in (second, last):
        folder.mkdir()
    (second / "sitecustomize.py").write_bytes((SHIM / "sitecustomize.py").read_bytes())
    (last / "sitecustomize.py").write_text("print('last')")
    assert run("print('program')", SHIM, second, SHIM, last) == "last\nprogram"
