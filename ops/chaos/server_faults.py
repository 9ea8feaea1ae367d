"""Faults of the vLLM servers that write for a run: killed, stopped, taken by another run (docs/vllm.md)."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.engine.shared import Shared
from actors.vllm.answers import BadAnswer
from actors.vllm.client import Client, RequestRefused, ServerDown, ServerFailed
from actors.vllm.weights import OfModel, SwapLost, install, label_of, version_in
from common.pretrained import find_model, weight_files
from common.runfiles.names import LOGS, WEIGHTS
from common.wire.exclusive import exclusively
from common.wire.plane import RunGone, Stopping
from common.wire.weights import newest_version
from ops.chaos.cluster import Cluster, Missed
from ops.chaos.recovery import stopped
from ops.chaos.servers import VllmServer

_BACK_S = 120.0  # within which a server is at work again that need not be started
_NOTICED_S = 60.0  # within which a worker notices
_NOT_SWAPPED = (ServerDown, ServerFailed, RequestRefused, BadAnswer, SwapLost, RunGone, Stopping)


def kill_server(cluster: Cluster, rng: random.Random, _: object, __: int) -> str:
    """A server's first process, or the one that computes; its worker must start it again."""
    server = _server(cluster, rng)
    engine = server.engine()
    pid = rng.choice([server.pid, engine or server.pid])
    os.kill(pid, signal.SIGKILL)
    what = f"kill -9 of {'its engine' if pid == engine else 'a server'}"
    return f"{what}, {_at_work_again(cluster, server, 0, another=True)}"


def pause_server(cluster: Cluster, rng: random.Random, _: object, __: int) -> str:
    """All processes of a server stopped until its worker has noticed, and for some seconds more."""
    server, seconds = _server(cluster, rng), rng.uniform(0.5, 6.0)
    log = Path(f"/proc/{server.worker}/fd/2").resolve()  # logs/rollout-*.log
    size, began = log.stat().st_size, time.monotonic()

    def noticed() -> bool:
        return b"server cannot be used" in _tail(log, size)

    with stopped(*server.processes()):
        _wait(cluster, noticed, _NOTICED_S, "its worker asked nothing of it")
        time.sleep(seconds)
    written = server.generated()
    stopped_s = time.monotonic() - began
    return f"stopped {stopped_s:.1f} s, {_at_work_again(cluster, server, written, another=False)}"


def give_other_weights(cluster: Cluster, rng: random.Random, _: object, __: int) -> str:
    """Another run takes a server: it loads weights of its own, under its own label, as rollout workers do.

    It does so between two swaps of this run, whose lock it holds meanwhile: two runs that swap one server at the same
    moment are more than Katana promises (RELIABILITY.md).
    """
    server = _server(cluster, rng)
    run, version = f"another-{rng.getrandbits(32):08x}", max(0, newest_version(cluster.folder / WEIGHTS))
    weights, began = OfModel.of(_other_weights(cluster)), time.monotonic()

    def pause(seconds: float) -> bool:
        time.sleep(seconds)
        return cluster.closing.is_set()

    other = Shared(run, cluster.harness_folder, lambda: 0, lambda what: exclusively(cluster.plane, what, pause), pause)
    client = Client(server.url, request_timeout_s=_NOTICED_S)
    try:
        install(client, other, version, weights)
    except _NOT_SWAPPED as error:
        raise Missed(f"{type(error).__name__}: {error}") from error
    finally:
        client.close()
    label = label_of(run, version, weights)

    def ours() -> bool:
        return version_in(server.label(), cluster.run_key) is not None

    _wait(cluster, lambda: _refused(cluster, label) or ours(), _NOTICED_S, "nothing was asked of the server")
    if not _refused(cluster, label):
        raise Missed("its workers gave it the run's weights before it had written anything")
    _wait_back(cluster, ours, "its weights are not the run's")
    return f"had version {version} of {run}, the run's again after {time.monotonic() - began:.1f} s"


def _other_weights(cluster: Cluster) -> Path:
    """A folder with weights of the student's shape that are far from the run's: half of each matrix is noise."""
    folder = cluster.harness_folder / "another-run"
    path = folder / "model.safetensors"
    with cluster.making_weights:
        if not path.exists():
            folder.mkdir(exist_ok=True)
            generator = torch.Generator().manual_seed(0)
            tensors: dict[str, torch.Tensor] = {}
            for file in weight_files(find_model(cluster.config.student.model)):
                for name, values in load_file(file).items():
                    noise = torch.randn(values.shape, generator=generator) * values.float().std(correction=0)
                    tensors[name] = (values + noise.to(values.dtype)) if values.ndim > 1 else values
            save_file(tensors, path, {"format": "pt"})
    return folder


def _server(cluster: Cluster, rng: random.Random) -> VllmServer:
    """One that has the run's weights; others may be starting. Raises Missed, RunEnded."""
    found: list[VllmServer] = []

    def any_ready() -> bool:
        found[:] = [one for one in cluster.vllm_servers() if version_in(one.label(), cluster.run_key) is not None]
        return bool(found)

    _wait(cluster, any_ready, cluster.patience(_NOTICED_S), "no server had weights of the run")
    return rng.choice(found)


def _at_work_again(cluster: Cluster, before: VllmServer, written: int, *, another: bool) -> str:
    """Wait until a worker's server writes again, more than `written` if it is the same process. Raises TimeoutError.

    `another`: the same process does not do.
    """
    began = time.monotonic()

    def back() -> bool:
        if before.worker not in cluster.pids("rollout"):
            return True
        for server in cluster.vllm_servers():
            if server.worker == before.worker and not (another and server.pid == before.pid):
                floor = written if server.pid == before.pid else 0
                return server.generated() > floor and version_in(server.label(), cluster.run_key) is not None
        return False

    _wait_back(cluster, back, "its server does not write again")
    if before.worker not in cluster.pids("rollout"):
        return "then its worker was struck by another fault"
    return f"at work again after {time.monotonic() - began:.1f} s"


def _wait_back(cluster: Cluster, true: Callable[[], bool], what: str) -> None:
    """Raises TimeoutError."""
    limit = cluster.patience(_BACK_S)
    try:
        _wait(cluster, true, limit, what)
    except Missed as error:
        raise TimeoutError(f"{what}, after {limit:.0f} s") from error


def _wait(cluster: Cluster, true: Callable[[], bool], limit_s: float, what: str) -> None:
    """Raises Missed, RunEnded."""
    deadline = time.monotonic() + limit_s
    while not true():
        cluster.check_alive()
        if time.monotonic() > deadline:
            raise Missed(f"{what} within {limit_s:.0f} s")
        time.sleep(0.05)


def _refused(cluster: Cluster, label: str) -> bool:
    """Whether a rollout worker says that tokens were written under this label."""
    logs = (cluster.folder / LOGS).glob("rollout-*.log")
    return any(f"{label!r:.80}, which is no version of this run".encode() in log.read_bytes() for log in logs)


def _tail(log: Path, size: int) -> bytes:
    with log.open("rb") as file:
        file.seek(size)
        return file.read()
