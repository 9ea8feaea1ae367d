"""The trace of a run (`trace: true`): what each process does when, and the stages of each rollout, as JSON lines.

A process that serves a role writes one file, `trace/ROLE-N.jsonl` in the run's folder, N counting the files of the
role: each worker task and each restart has its own. Loops never ask whether the trace is on: off, `span` costs one look
at a variable. `katana trace` puts the files together.

Invariant: spans of a file nest, because only the thread that opened it writes to it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from common.config import Config
from common.runfiles.names import TRACE

log = logging.getLogger("katana.trace")
MOST_EVENTS = 400_000
"""Of one file, about 40 MB: then a last line tells how many events there are, and the process traces no more."""

_AT_ONCE = 512  # events in memory
_FLUSH_S = 1.0  # at most so much is lost by kill -9
_NOTHING = nullcontext()

SpanKind = Literal["work", "redis", "wait"]
"""What a process does in a span: compute, wait for Redis's answer, or wait for something to do."""


class _Span:
    """An open span, as a context manager."""

    __slots__ = ("_began_ns", "_writer", "facts", "kind", "name")

    def __init__(self, writer: _Writer, name: str, kind: SpanKind, facts: dict[str, int]) -> None:
        self._writer, self.name, self.kind, self.facts = writer, name, kind, facts

    def __enter__(self) -> None:
        self._began_ns = time.perf_counter_ns()
        self._writer.open_spans.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.open_spans.pop()
        self._writer.add_span(self, self._began_ns, time.perf_counter_ns())


class _Writer:
    """Appends events to a file; an error of the disk ends the trace, not the role."""

    def __init__(self, folder: Path, role: str, run: str) -> None:
        self.thread = threading.get_ident()
        self.open_spans: list[_Span] = []
        # The wall clock may be set back, and then spans would not nest: it is read once.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._lines: list[dict[str, Any]] = []
        self._written, self._flush_at_ns = 0, 0
        self._file: FileIO | None = _new_file(folder, role)
        host, pid = socket.gethostname(), os.getpid()
        self._put({"role": role, "run": run, "host": host, "pid": pid, "at_us": self._us(time.perf_counter_ns())})

    def add_span(self, span: _Span, began_ns: int, ended_ns: int) -> None:
        line: dict[str, Any] = {"span": span.name, "kind": span.kind, "at_us": self._us(began_ns)}
        line["us"] = self._us(ended_ns) - line["at_us"]
        if span.facts:
            line["facts"] = span.facts
        self._put(line)

    def add_stage(self, rid: str, stage: str, at_ns: int, facts: dict[str, int]) -> None:
        line: dict[str, Any] = {"rid": rid, "stage": stage, "at_us": self._us(at_ns)}
        if facts:
            line["facts"] = facts
        self._put(line)

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _us(self, counter_ns: int) -> int:
        return (self._epoch_ns + counter_ns) // 1000

    def _put(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._lines.append(line)
        self._written += 1
        if self._written == MOST_EVENTS:
            log.warning("the trace of this process is full: %d events", MOST_EVENTS)
            self._lines.append({"full": MOST_EVENTS, "at_us": line["at_us"]})
            self.close()
        elif len(self._lines) >= _AT_ONCE or time.perf_counter_ns() >= self._flush_at_ns:
            self._flush()

    def _flush(self) -> None:
        """Write what is in memory in one call: after a kill at most the last line is torn."""
        lines, self._lines = self._lines, []
        self._flush_at_ns = time.perf_counter_ns() + int(_FLUSH_S * 1e9)
        if self._file is None or not lines:
            return
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        try:
            while data:  # a raw file may write only a part
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            log.warning("no more trace of this process: %s", error)
            self._file.close()
            self._file = None


_writer: _Writer | None = None


def span(name: str, kind: SpanKind = "work", **facts: int) -> AbstractContextManager[None]:
    """What this process does until the context ends. `facts`: numbers to show with it."""
    if _writer is None or _writer.thread != threading.get_ident():
        return _NOTHING
    return _Span(_writer, name, kind, facts)


def note(**facts: int) -> None:
    """Add numbers to the innermost open span."""
    if _writer is not None and _writer.open_spans and _writer.thread == threading.get_ident():
        _writer.open_spans[-1].facts.update(facts)


def stage(rid: str, stage: str, *, at_ns: int | None = None, **facts: int) -> None:
    """A rollout has got so far: admitted, taken, chunk, scored, seen, verdict, trained or booked.

    `at_ns`: when, by `time.perf_counter_ns`; None: now. What another process may act upon before this one hears that it
    is done happened when it was asked for.
    """
    if _writer is not None and _writer.thread == threading.get_ident():
        _writer.add_stage(rid, stage, time.perf_counter_ns() if at_ns is None else at_ns, facts)


@contextmanager
def of_role(config: Config, role: str) -> Iterator[None]:
    """Trace this process as a role of a run, if `trace` is on in its config. A folder that cannot be written to is
    logged, and the work goes on."""
    global _writer
    if not config.trace:
        yield
        return
    try:
        _writer = _Writer(config.run_dir / TRACE, role, config.name)
    except OSError as error:
        log.warning("no trace of this process: %s", error)
    try:
        yield
    finally:
        if _writer is not None:
            _writer.close()
        _writer = None


def _new_file(folder: Path, role: str) -> FileIO:
    """A file that is nobody else's, on whichever host."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob(f"{role}-*.jsonl")))
    while True:
        try:
            return FileIO(folder / f"{role}-{number}.jsonl", "x")
        except FileExistsError:
            number += 1
