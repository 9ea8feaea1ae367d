"""The vLLM servers that write for a run, found as an operator would: by command lines, and over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.vllm.server import GUARD
from common.config.sections import Vllm

_ANSWER_S = 5.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server is a machine of one's own
_COUNT = re.compile(r"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class VllmServer:
    """url: where it is; pid: its first process, and worker: that of the rollout worker that has started it; both 0
    where the run has found it at one of `urls`."""

    url: str
    pid: int = 0
    worker: int = 0

    def processes(self) -> list[int]:
        """Its first process and all that it has started: they are one session."""
        return [one.pid for one in _processes() if self.pid and one.session == self.pid]

    def engine(self) -> int | None:
        """The process that computes, where it is another one than the first."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if pid != self.pid and b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def label(self) -> str:
        """What it calls its weights; '' if it does not answer."""
        try:
            return str(json.loads(self._get("/weight_info"))["weight_version"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""

    def generated(self) -> int:
        """Tokens that it has written since it began; 0 if it does not answer."""
        try:
            return written_tokens(self._get("/metrics"))
        except (OSError, ValueError):
            return 0

    def _get(self, path: str) -> str:
        with _NO_PROXY.open(self.url + path, timeout=_ANSWER_S) as answer:
            return str(answer.read().decode())


def written_tokens(metrics: str) -> int:
    """Tokens that a server has written since it began, by its own counter, from what it says at /metrics."""
    return int(sum(float(number) for number in _COUNT.findall(metrics)))


def servers_of(settings: Vllm | None, workers: list[int]) -> list[VllmServer]:
    """The servers of a run whose rollout workers are these processes, the oldest worker's first."""
    if settings is None:
        return []
    if settings.urls:
        return [VllmServer(url) for url in settings.urls]
    processes = list(_processes())
    found = []
    for guard in processes:
        if guard.parent in workers and guard.argv[1:3] == ["-I", str(GUARD)]:
            port = _port(settings.command, guard.argv[3:])
            first = next((one.pid for one in processes if one.parent == guard.pid), None)
            if port is not None and first is not None:
                found.append(VllmServer(f"http://127.0.0.1:{port}", first, guard.parent))
    return sorted(found, key=lambda one: workers.index(one.worker))


def _port(template: list[str], argv: list[str]) -> int | None:
    """The port that a worker has put into a command."""
    for before, after in zip(template, argv, strict=False):
        if "{port}" in before:
            shape = re.escape(before).replace(re.escape("{port}"), "([0-9]+)", 1)
            found = re.match(shape, after)
            return int(found[1]) if found else None
    return None


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    parent: int
    session: int
    argv: list[str]


def _processes() -> Iterator[_Process]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat: list[Any] = (entry / "stat").read_text().rpartition(")")[2].split()
                argv = [os.fsdecode(word) for word in (entry / "cmdline").read_bytes().split(b"\0")[:-1]]
                if argv:  # a zombie has none
                    yield _Process(int(entry.name), int(stat[1]), int(stat[3]), argv)
