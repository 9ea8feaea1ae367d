"""A server of a worker's own: started on a free port, watched, ended with the worker."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

log = logging.getLogger("katana.vllm")
GUARD = Path(__file__).with_name("guard.py")
_LAST_LINES = 20
_END_S = 20.0
# Of this process's Python: a server has its own.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")


class OwnServer:
    """A server that this process starts. `command`: its argv, in which {port} and {model} are replaced."""

    def __init__(self, command: tuple[str, ...], model: Path) -> None:
        self._port = _free_port()
        self._argv = [part.replace("{port}", str(self._port)).replace("{model}", str(model)) for part in command]
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    def url(self) -> str:
        """Where it is, also before it runs and after it was started again."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def runs(self) -> bool:
        """Whether its process is there; it may not answer yet."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it if it does not run. Raises OSError."""
        if self.runs:
            return
        self.end()  # what is left of one that has ended
        self._lines.clear()
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), *self._argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # what is sent to the worker's group is not for the server: the worker drains first
            env={**environment, "VLLM_SERVER_DEV_MODE": "1"},
        )
        threading.Thread(target=self._read, args=(self._process,), name="vllm-log", daemon=True).start()
        log.info("started %s", " ".join(self._argv))

    def end(self) -> None:
        """End it and all that it started. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def last_words(self) -> str:
        """How it ended, with the last lines of its log."""
        code = "none" if self._process is None else self._process.poll()
        lines = "".join(f"\n    {line}" for line in self._lines)
        return f"{self._argv[0]} ended with code {code}; its last lines:{lines or ' none'}"

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError), process.stdout:
            for line in process.stdout:
                self._lines.append(line.rstrip()[:500])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
