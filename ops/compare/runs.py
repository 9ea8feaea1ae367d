"""Runs the cells: each is a `katana run` process, some at a time; Ctrl-C stops them in order."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from common.config import ConfigError
from ops.compare.grid import Cell
from ops.reach.children import katana, start
from ops.run.local import EXIT_OK

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 40.0  # a run promises to stop within 20 s
_LOOK_S = 0.2


class Process(Protocol):
    """What is asked of a running cell; `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Interrupts:
    """Number of times this process was asked to stop."""

    def __init__(self) -> None:
        self.count = 0
        self._wake = threading.Event()

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        self._wake.set()

    def wait(self, seconds: float) -> None:
        """Wait until the first request to stop, at most this long."""
        self._wake.wait(seconds)

    @contextmanager
    def watched(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run_cells(
    cells: Sequence[Cell],
    *,
    jobs: int,
    begin: Callable[[Cell], Process],
    ended: Callable[[Cell, str], None],
    interrupts: Interrupts,
) -> None:
    """Run all cells in their order, at most `jobs` at a time; one waits for the one that it needs.

    `ended` is called with the result of each: "" for a cell that is done, else why it is not. A ConfigError
    of `begin` is such a reason. After an interrupt nothing is begun, what runs is stopped in order, and this returns.
    """
    waiting, running = list(cells), dict[Cell, Process]()
    try:
        while (waiting or running) and not interrupts.count:
            while len(running) < jobs and not interrupts.count:
                cell = next_ready(waiting, running.keys())
                if cell is None:
                    break
                waiting.remove(cell)
                try:
                    running[cell] = begin(cell)
                except ConfigError as error:
                    ended(cell, str(error))
            for cell, process in [*running.items()]:
                code = process.poll()
                if code is not None:
                    del running[cell]
                    ended(cell, "" if code == EXIT_OK else f"exit code {code}")
            if running:
                interrupts.wait(_LOOK_S)
    finally:
        _stop(list(running.values()), interrupts)


def next_ready(waiting: Sequence[Cell], running: Iterable[Cell]) -> Cell | None:
    """The first waiting cell that needs none that is waiting or running itself."""
    open_cells = {*waiting, *running}
    return next((cell for cell in waiting if cell.needs not in open_cells), None)


def _stop(running: Sequence[Process], interrupts: Interrupts) -> None:
    """Each run stops in order; at a second signal it stops at once."""
    signals = 0
    deadline = time.monotonic() + _GRACE_S
    while alive := [process for process in running if process.poll() is None]:
        if signals < max(1, interrupts.count):
            signals = max(1, interrupts.count)
            for process in alive:
                process.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()  # its roles get SIGTERM from the kernel with it
        time.sleep(_LOOK_S)


def start_run(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`katana run ARGUMENTS`; output to `log`."""
    return start(katana("run", *arguments), log, {"PYTHONUNBUFFERED": "1"})


def last_words(log: Path) -> str:
    """The last error line of a log, or else the last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or line.startswith("katana:")]
    return (errors or lines or ["no output"])[-1].strip()[-300:]
