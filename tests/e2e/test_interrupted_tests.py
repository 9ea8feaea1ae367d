"""A test run that is interrupted or told to stop ends what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from left_over import END_WITH_PARENT, MARK, marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
PYTEST = f"{sys.executable} -m pytest -p no:cacheprovider"
PROCESSES, WHOLE_RUN = "tests/e2e/interrupted.py", "tests/e2e/test_run.py -k fails_slowly"
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def pytest_of(shell: int) -> int:
    """The test run that a shell started, once it runs servers or roles of its own."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for pid in [shell, *children(shell)]:
            with_mark = [one for one in marks() if one.startswith(f"{pid}-")]
            if with_mark and len(marked(with_mark[0])) >= 4:
                return pid
        time.sleep(0.2)
    raise TimeoutError("the test run started nothing")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in text.read_text().split()] if text.exists() else []


def marks() -> set[str]:
    """Every mark that some process carries."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        found |= {one.decode().partition("=")[2] for one in variables if one.startswith(MARK.encode() + b"=")}
    return found


def _hear_interrupts() -> None:
    """A shell lets its background jobs, of which these tests may be one, ignore Ctrl-C; children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("tests", "numbers"),
    [
        (PROCESSES, [INT]),
        (PROCESSES, [TERM]),
        (PROCESSES, [HUP]),
        (PROCESSES, [INT, TERM, HUP] * 3),
        (WHOLE_RUN, [INT] * 8),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "each in turn, three times", "SIGINT, eight times, to a whole run"],
)
def test_nothing_is_left_of_a_test_run_that_is_told_to_end(
    tmp_path: Path, tests: str, numbers: list[signal.Signals]
) -> None:
    run = subprocess.Popen(
        [*PYTEST.split(), *tests.split(), f"--basetemp={tmp_path / 'inner'}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_hear_interrupts,
    )
    pid = pytest_of(run.pid)
    [mark] = [one for one in marks() if one.startswith(f"{pid}-")]
    for number in numbers:
        run.send_signal(number)  # to a process that has ended: nothing
        time.sleep(0.2)
    assert run.wait(60) != 0
    assert marked(mark) == []


def test_nothing_is_left_where_the_shell_above_is_killed(tmp_path: Path) -> None:
    command = f"{PYTEST} {PROCESSES} --basetemp={tmp_path / 'inner'}; true"
    environment = os.environ | {END_WITH_PARENT: "1"}
    shell = subprocess.Popen(
        ["sh", "-c", command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = pytest_of(shell.pid)
    [mark] = [one for one in marks() if one.startswith(f"{pid}-")]
    shell.kill()
    shell.wait(10)
    deadline = time.monotonic() + 60
    while (Path(f"/proc/{pid}").exists() or marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{pid}").exists()
    assert marked(mark) == []
