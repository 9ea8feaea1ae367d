"""The cost of workers without work: the real loops and heartbeats of many on one Redis, with engines of no model."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import zeros

from actors.engine.adapters import unpacked
from actors.rollout import RolloutWorker
from actors.teacher import TeacherWorker
from common.config import Config, parse
from common.runfiles.names import WEIGHTS
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.plane import create_run, new_run_key, open_plane
from common.wire.weights import publish
from ops.bench.speed import machine, spread
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import with_redis

_SETTLE_S = 25.0  # until workers that found nothing ask as seldom as they do
_MEASURE_S = 6.0
_A_PROCESS = 200  # workers of one process: more would wait for its interpreter


class _NoEngine:
    """Replaces a decoder and a scorer that get no work."""

    busy: tuple[str, ...] = ()
    slots = free = 32
    held = decoded_tokens = rebuilt_tokens = 0

    def read_weights(self, data: bytes) -> Any:
        return unpacked(data)

    def attach(self, shared: Any) -> bool:
        return True

    def swap(self, state: Any, version: int = 0) -> None:
        pass

    def prove(self) -> None:
        pass

    def close_chunks(self) -> list[Any]:
        return []


def idle(config: Config, repeats: int, *, workers: int = 1000) -> dict[str, Any]:
    """Commands and processor time of a Redis that so many idle workers ask: half rollout and half teacher workers, each
    a thread with connections of its own, in as many processes as it takes for them to be in time."""
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        server = EmbeddedRedis(Path(folder) / "redis", maxmemory_mb=256)
        server.start()
        try:
            there = config.model_copy(update={"name": "bench", "runs_dir": folder})
            return _measure(with_redis(there, server.url, None), repeats, workers) | {"machine": machine()}
        finally:
            server.stop()


def _measure(config: Config, repeats: int, workers: int) -> dict[str, Any]:
    stop, run_key = threading.Event(), new_run_key(config.name)
    client: Any = connect(str(config.redis.url))
    create_run(client, config, run_key)
    plane = open_plane(config, client, run_key)
    lease = Lease(plane, "learner", 3600.0)
    lease.acquire(stop)
    ref = publish(config.run_dir / WEIGHTS, 0, lambda path: save_file({"none": zeros(1)}, path))
    lease.call(scripts.publish(0, 0, ref.file, ref.sha256))
    context = multiprocessing.get_context("spawn")  # this process has threads: a fork of it could hang
    over = context.Event()
    processes = [
        context.Process(
            target=_serve_many, args=(config.to_yaml(), run_key, over, first, min(first + _A_PROCESS, workers))
        )
        for first in range(0, workers, _A_PROCESS)
    ]
    for process in processes:
        process.start()
    try:
        while len(client.zrange(plane.key("workers"), 0, -1)) < workers:
            if any(process.exitcode is not None for process in processes):
                raise RuntimeError("a process of idle workers ended")
            time.sleep(0.2)
        time.sleep(_SETTLE_S)
        found = [_sample(client) for _ in range(repeats)]
    finally:
        over.set()
        for process in processes:
            process.join()
    return {
        "what": "idle workers on one Redis",
        "workers": workers,
        "shards": config.redis.shards,
        **{name: spread([one[name] for one in found]) for name in found[0]},
    }


def _serve_many(config_yaml: str, run_key: str, over: Event, first: int, last: int) -> None:
    config, stop = parse(config_yaml), threading.Event()
    threads = [threading.Thread(target=_serve, args=(config, run_key, stop, number)) for number in range(first, last)]
    for thread in threads:
        thread.start()
    over.wait()
    stop.set()
    for thread in threads:
        thread.join()


def _serve(config: Config, run_key: str, stop: threading.Event, number: int) -> None:
    plane = open_plane(config, connect(str(config.redis.url)), run_key, stop)
    engine: Any = _NoEngine()
    worker: RolloutWorker | TeacherWorker
    if number % 2:
        worker = RolloutWorker(config, plane, engine, worker=f"rollout-host-{number}", stop=stop)
    else:
        name = f"teacher-host-{number}"
        worker = TeacherWorker(config, plane, engine, vocab_size=37, stop_count=1, worker=name, stop=stop)
    worker.serve(time.monotonic() + 3600)


def _sample(client: Any) -> dict[str, float]:
    before, began = _counts(client), time.monotonic()
    time.sleep(_MEASURE_S)
    after, seconds = _counts(client), time.monotonic() - began
    return {name: (after[name] - before[name]) / seconds for name in after}


def _counts(client: Any) -> dict[str, float]:
    cpu = client.info("cpu")
    return {
        "redis_commands_per_s": float(client.info("stats")["total_commands_processed"]),
        "redis_cores": cpu["used_cpu_user"] + cpu["used_cpu_sys"],
    }
