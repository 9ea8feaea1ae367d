"""The nursery: a process that imports once what the roles need, and from which `katana run` has them forked.

Importing torch and transformers takes seconds of processor time, for every role anew; a fork takes milliseconds. This
is the side of `katana run`; forking.py is the other.

The nursery forks twice, and the process in between ends at once: so a role becomes a child of `katana run` itself. Exit
codes and signals arrive as from any child, and the death of the nursery does not touch the roles. (The kernel gives an
orphan to the nearest ancestor that asked for it; `katana run` does so while it waits for one.)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from common.config import Config
from common.pretrained import model_type
from common.runfiles.names import CONFIG
from ops.reach.children import end, start

log = logging.getLogger("katana.nursery")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_CHILD_SUBREAPER = 36
_MOST_DEATHS = 5  # of the nursery, before it is ready and has forked what it was asked for
_DRAIN_S = 2.0  # for what it was forking when it was told to end
_MESSAGE_BYTES = 1 << 16
_ROOM = 4096  # bytes of its command line, in which a role writes its own
# One thread, or a library starts its pool before the fork, and a fork has only the thread that forks. NVML: a look for
# a GPU must not initialise CUDA, which no fork could then use. The roles do not inherit these.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class NurseryFailed(RuntimeError):
    """The nursery ended again and again, before it had forked anything. `code` is the exit code of the command."""

    code = 1


@dataclass(slots=True, eq=False)
class Forked:
    """A role forked by the nursery; used as a Popen. `pid` is None until it is born."""

    nursery: Nursery
    request: bytes
    log: Path
    pid: int | None = None
    returncode: int | None = None
    sent: bool = False
    ours: bool = False  # it has become a child of this process

    def poll(self) -> int | None:
        if self.pid is None and self.returncode is None:
            self.nursery.attend()
        if self.pid is None or self.returncode is not None:
            return self.returncode
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # not yet ours
            if not _exists(self.pid):  # nor ever: another took its exit code
                self.returncode = -signal.SIGKILL
            return self.returncode
        self.ours = True
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.request.decode(), timeout or 0.0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """One that is not born yet will not be: any signal ends it."""
        if self.poll() is not None:
            return
        if self.pid is None:
            self.nursery.forget(self)
            self.returncode = -number
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """Use as a context manager, from the main thread. It begins to import at once, while this process goes on.

    `config`: the path of the run's, which its command line shows; `model_types`: whose code it imports too, by the
    names in config.json.
    """

    def __init__(self, config: Path, model_types: Sequence[str] = ()) -> None:
        self._words = [sys.executable, "-m", "ops.cli.nursery", str(config), ",".join(model_types)]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  the run's folder is not there yet
        self.ready = False  # it has imported everything
        self._deaths = 0
        self._waiting: dict[int, Forked] = {}  # by request, not born yet
        self._born: list[Forked] = []  # not known yet to be ours
        self._requests = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket
        self._begin()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def fork(self, words: Sequence[str], log: Path, environment: Mapping[str, str], threads: int) -> Forked:
        """`katana WORDS` in a process of its own session, as `ops.reach.children.start`, once the nursery is ready;
        torch computes with so many threads."""
        self._requests += 1
        ours: dict[str, str | None] = {name: os.environ.get(name) for name in _ENVIRONMENT}  # None: not set
        request = {"request": self._requests, "words": list(words), "environment": ours | dict(environment)}
        message = json.dumps(request | {"threads": threads}).encode()
        child = self._waiting[self._requests] = Forked(self, message, log)
        self._send()
        return child

    def forget(self, child: Forked) -> None:
        """Do not wait for a child any more; if it comes after all, it is killed."""
        self._waiting = {number: one for number, one in self._waiting.items() if one is not child}

    def attend(self) -> None:
        """Note what was born, and start the nursery again if it has ended: no request is lost. Raises NurseryFailed."""
        if self._process is None:
            return
        if not self._take_reports():
            self._deaths += 1
            code = self._process.wait()
            words = self._last_words()
            self._line.close()
            self._process = None
            if self._deaths > _MOST_DEATHS:
                raise NurseryFailed(f"the nursery, which forks the roles, ended {self._deaths} times in a row: {words}")
            log.warning("the nursery exited with %d; restarted%s", code, f" ({words})" if code > 0 else "")
            self._begin()
        self._send()
        for child in self._born:
            child.poll()
        self._born = [child for child in self._born if not child.ours and child.returncode is None]
        if not self._waiting and not self._born:
            _adopt(False)

    def close(self) -> None:
        """End it. What it has forked lives on and stays known; what it has not forked yet will not be."""
        if self._process is not None:
            end([self._process], _DRAIN_S)
            until = time.monotonic() + _DRAIN_S
            while self._take_reports() and time.monotonic() < until:
                time.sleep(0.01)
            self._line.close()
            self._process = None
        _adopt(False)
        for child in self._waiting.values():
            child.returncode = -signal.SIGTERM
        self._waiting.clear()
        self._output.close()

    def _begin(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [*self._words, str(os.getpid()), str(theirs.fileno()), "." * _ROOM]
            self._process = start(words, self._output, _ENVIRONMENT, keep=[theirs.fileno()])
        self.ready = False
        self._line.setblocking(False)
        for child in self._waiting.values():
            child.sent = False

    def _send(self) -> None:
        """Send the requests that are not sent. One that cannot be sent now is sent at the next call."""
        for child in self._waiting.values():
            if not child.sent:
                _adopt(True)
                with child.log.open("ab") as out:
                    try:
                        socket.send_fds(self._line, [child.request], [out.fileno()])
                    except OSError:  # its buffer is full, or it has ended
                        return
                child.sent = True

    def _take_reports(self) -> bool:
        """False: it has ended, and everything that it forked has been reported."""
        for report in self._reports():
            if report is None:
                return False
            self.ready = True
            if "request" in report or not self._waiting:  # it has not died of what it is asked for
                self._deaths = 0
            if "request" not in report:
                continue
            child, pid = self._waiting.pop(report["request"], None), report["pid"]
            if child is None:  # forgotten
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            else:
                child.pid = pid
                self._born.append(child)
        return True

    def _reports(self) -> Iterator[dict[str, Any] | None]:
        """What has come; None at the end."""
        while True:
            try:
                message = self._line.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            yield json.loads(message) if message else None
            if not message:
                return

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return [line.strip() for line in ["no output", *lines] if line.strip()][-1][-500:]


def begin_nursery(config: Config) -> AbstractContextManager[Nursery | None]:
    """The nursery of a run, which imports while the caller goes on; None elsewhere than on Linux, which alone has what
    it takes."""
    if _LIBC is None:
        return contextlib.nullcontext()
    teachers = [teacher.model for teacher in config.all_teachers.values()]
    types = {model_type(model) for model in (config.student.model, *teachers)}
    return Nursery(config.run_dir / CONFIG, sorted(filter(None, types)))


def _adopt(wanted: bool) -> None:
    """Whether orphans of this process's descendants become its children. Only while one is expected: what a killed role
    leaves behind is not for this process to wait for."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
