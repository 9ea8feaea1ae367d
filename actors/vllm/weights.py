"""A server's weights: which it has, by the label that it carries, and how others are swapped in.

A label is `katana:{run}:{version}:{digest}`, and every answer of the server says under which label its tokens were
written. While weights are being loaded the label is one that no version has: a worker that dies in the middle leaves a
paused server with that label, and the next worker swaps anew. So no label is ever that of other weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from actors.engine.adapters import Adapter
from actors.engine.base_files import BaseFiles
from actors.engine.shared import Shared
from actors.vllm.client import Client, RequestRefused, ServerDown, ServerFailed
from common.files import write_atomically
from common.wire.plane import Stopping

log = logging.getLogger("katana.vllm")
FOLDER = "vllm"  # inside the run's folder of weights
_LABEL = re.compile(r"katana:([A-Za-z0-9._-]+):([0-9]{1,15}):[0-9a-f]{12}", re.ASCII)
_LOADING = "katana:loading"
LOAD_S = 600.0  # the longest that a server may take to load weights
_PAUSE_S = 30.0  # it ends the step that it computes
_APPEARS_S = 5.0  # a network's file may be seen so much later than it was written
_AGAIN_S = 0.5
_SHARE = "it needs that folder, read-only, under the same path (docs/vllm.md)"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A published file, whole and verified. sha256: of `data`."""

    sha256: str
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> WeightsFile:
        return cls(hashlib.sha256(data).hexdigest(), data)

    def write(self, path: Path) -> None:
        path.write_bytes(self.data)


@dataclass(frozen=True, slots=True)
class WithAdapter:
    """A published adapter, verified, and what it is merged into for a server. sha256: of the adapter's file."""

    sha256: str
    adapter: Adapter
    base: BaseFiles

    @classmethod
    def of(cls, data: bytes, adapter: Adapter, base: BaseFiles) -> WithAdapter:
        """Raises ValueError for an adapter of another base."""
        base.check(adapter)
        return cls(hashlib.sha256(data).hexdigest(), adapter, base)

    def write(self, path: Path) -> None:
        self.base.write(path, self.adapter)


@dataclass(frozen=True, slots=True)
class OfModel:
    """The weights in a model's folder, which a server reads where they are. sha256: of the folder's path; who swaps
    such weights numbers them, which tells them apart."""

    sha256: str
    folder: Path

    @classmethod
    def of(cls, folder: Path) -> OfModel:
        path = folder.resolve()
        return cls(hashlib.sha256(str(path).encode()).hexdigest(), path)


Given = WeightsFile | WithAdapter | OfModel


def label_of(run: str, version: int, weights: Given) -> str:
    return f"katana:{run}:{version}:{weights.sha256[:12]}"


def version_in(label: str, run: str) -> int | None:
    """The version that a label names; None if it is not of this run."""
    found = _LABEL.fullmatch(label)
    return int(found[2]) if found and found[1] == run else None


class SwapLost(Exception):
    """Another worker has the lock on this server by now, since this one was stopped or slow: it must do no more."""


class FolderUnread(Exception):
    """The server does not read what is written for it. What it has is as it was."""


class NotLoaded(ServerFailed):
    """The server did not load weights; it ends itself at the next token (DECISIONS.md, 137)."""


def install(client: Client, shared: Shared, version: int, weights: Given, *, reads: bool = False) -> None:
    """Let the server write with these weights, unless it has these or later ones of the run. What is being written goes
    on with them. One worker at a time; the server generates whenever this returns or raises, if it can be reached.

    reads: it is known to read the run's folder. Raises ServerDown, ServerFailed, RequestRefused, BadAnswer, SwapLost,
    FolderUnread, OSError; the server is to be asked again then. Stopping: the worker is to end.
    """
    if _has(client, shared.run, version) and not client.paused():
        return
    name = server_name(client.url)
    with shared.exclusively(name) as mine:
        if _has(client, shared.run, version):
            if client.paused():
                client.post("/resume")
            return
        folder = shared.weights.resolve() / FOLDER / name
        if isinstance(weights, OfModel):
            path = weights.folder
        else:
            if not reads:
                _check_reads(client, folder / "empty", shared.pause)
            path = _written(folder, version, weights)
        with _paused(client):
            _relabel(client, mine, f"{_LOADING}:{shared.run}:{secrets.token_hex(6)}")
            _load(client, path)
            _relabel(client, mine, label_of(shared.run, version, weights))
        for other in folder.glob("*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)


def _has(client: Client, run: str, version: int) -> bool:
    has = version_in(client.label(), run)
    return has is not None and has >= version


def _check_reads(client: Client, folder: Path, pause: Callable[[float], bool]) -> None:
    """Have the server read a file without tensors, as numbers that replace single parameters: its model stays as it is,
    whether it can read the file or not (where it is given weights in a model's own form, the model is gone first).
    Raises FolderUnread, Stopping, and what a request raises."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", lambda draft: save_file({}, draft))
    until = time.monotonic() + _APPEARS_S
    while True:
        try:
            return client.load("/collective_rpc", _reload(folder, is_checkpoint_format=False), LOAD_S)
        except ServerFailed as error:
            if time.monotonic() > until:
                raise FolderUnread(
                    f"the server {client.url} does not read {folder}: {_SHARE}; it says: {error}"
                ) from error
        if pause(_AGAIN_S):
            raise Stopping


def _load(client: Client, folder: Path) -> None:
    """Raises NotLoaded, ServerDown, RequestRefused, BadAnswer."""
    try:
        client.load("/collective_rpc", _reload(folder), LOAD_S)
    except ServerFailed as error:
        words = f"the server {client.url} did not load {folder}, and ends itself for that: {_SHARE}"
        raise NotLoaded(f"{words}; it says: {error}") from error


def _reload(folder: Path, **more: bool) -> dict[str, Any]:
    return {"method": "reload_weights", "kwargs": {"weights_path": str(folder), **more}}


@contextlib.contextmanager
def _paused(client: Client) -> Iterator[None]:
    """Nothing is generated inside; requests stay."""
    client.post("/pause?mode=keep", timeout_s=_PAUSE_S)
    try:
        yield
    except SwapLost:
        raise  # another worker has paused it, and will resume it
    except BaseException:
        with contextlib.suppress(ServerDown, ServerFailed, RequestRefused):
            client.post("/resume")  # its label says that these weights are no version of the run
        raise
    client.post("/resume")


def _relabel(client: Client, mine: Callable[[], bool], label: str) -> None:
    if not mine():
        raise SwapLost(f"{client.url}: another worker swaps its weights")
    client.post("/update_weight_version", {"new_version": label})


def _written(folder: Path, version: int, weights: WeightsFile | WithAdapter) -> Path:
    """A folder with these weights alone, from which a server can read them."""
    path = folder / f"v{version:08d}-{weights.sha256[:12]}"
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "model.safetensors", weights.write)
    return path


def server_name(url: str) -> str:
    """A server's name in the names of locks and folders."""
    return hashlib.sha256(url.encode()).hexdigest()[:12]
