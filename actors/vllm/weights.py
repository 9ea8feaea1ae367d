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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.engine.shared import Shared
from actors.vllm.client import Client, RequestRefused, ServerDown, ServerFailed
from common.files import write_atomically

log = logging.getLogger("katana.vllm")
FOLDER = "vllm"  # inside the run's folder of weights
_LABEL = re.compile(r"katana:([A-Za-z0-9._-]+):([0-9]{1,15}):[0-9a-f]{12}", re.ASCII)
_LOADING = "katana:loading"
LOAD_S = 600.0  # the longest that a server may take to load weights
_PAUSE_S = 30.0  # it ends the step that it computes


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A published file, whole and verified. sha256: of `data`."""

    sha256: str
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> WeightsFile:
        return cls(hashlib.sha256(data).hexdigest(), data)


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


def label_of(run: str, version: int, weights: WeightsFile | OfModel) -> str:
    return f"katana:{run}:{version}:{weights.sha256[:12]}"


def version_in(label: str, run: str) -> int | None:
    """The version that a label names; None if it is not of this run."""
    found = _LABEL.fullmatch(label)
    return int(found[2]) if found and found[1] == run else None


class SwapLost(Exception):
    """Another worker has the lock on this server by now, since this one was stopped or slow: it must do no more."""


def install(client: Client, shared: Shared, version: int, weights: WeightsFile | OfModel) -> None:
    """Let the server write with these weights, unless it has these or later ones of the run. What is being written goes
    on with them. One worker at a time; the server generates whenever this returns or raises, if it can be reached.

    Raises ServerDown, ServerFailed, RequestRefused, BadAnswer, SwapLost, OSError; the server is to be asked again then.
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
        path = weights.folder if isinstance(weights, OfModel) else _written(folder, version, weights)
        with _paused(client):
            _relabel(client, mine, f"{_LOADING}:{shared.run}:{secrets.token_hex(6)}")
            arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            client.load("/collective_rpc", arguments, LOAD_S)
            _relabel(client, mine, label_of(shared.run, version, weights))
        for other in folder.glob("*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)


def _has(client: Client, run: str, version: int) -> bool:
    has = version_in(client.label(), run)
    return has is not None and has >= version


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


def _written(folder: Path, version: int, weights: WeightsFile) -> Path:
    """A folder with these weights alone, from which a server can read them."""
    path = folder / f"v{version:08d}-{weights.sha256[:12]}"
    path.mkdir(parents=True, exist_ok=True)

    def write(draft: Path) -> None:
        draft.write_bytes(weights.data)

    write_atomically(path / "model.safetensors", write)
    return path


def server_name(url: str) -> str:
    """A server's name in the names of locks and folders."""
    return hashlib.sha256(url.encode()).hexdigest()[:12]
