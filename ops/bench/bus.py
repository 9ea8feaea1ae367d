"""The bus: chunks a second through the real roles, as processes on a real Redis, with recorded payloads for models."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import zeros

from actors.arbiter import Arbiter
from actors.feeder import Feeder
from actors.rollout import RolloutWorker
from actors.teacher import TeacherWorker
from common import tracing
from common.config import Config, parse
from common.pretrained import check_pair
from common.runfiles.names import WEIGHTS
from common.runfiles.tracing import TracedStage, read_traces
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.plane import Plane, create_run, new_run_key, open_plane
from common.wire.scripts import Ending
from common.wire.weights import publish
from learner.intake import Intake
from ops.bench.recorded import RecordedRollout, record
from ops.bench.replayed import ReplayedDecoder, ReplayedPrompts, ReplayedScorer
from ops.bench.speed import machine, spread
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import with_redis

_RECORDED = 64
_WARM_UP_S = 4.0
_MEASURE_S = 5.0  # of each repeat
_START_S = 120.0  # until the roles are at work: workers import torch
_FIGURES = {
    "chunks_per_s": "chunks whose scores were stored, by the seconds of a repeat",
    "scored_ms": "from the closing of a chunk by the writer to the teacher's receipt that its score is stored",
    "seen_ms": "from the closing of a chunk to the writer's knowledge of its score; of scores learnt at once the last",
    "verdict_ms": "from the closing of the last chunk that a verdict covers to the arbiter's receipt that it is stored",
    "cpu_us": "processor time of all processes of a role, or of Redis, by those chunks: all of it but the models'",
    "redis_bytes": "what Redis received (in) and sent (out), by those chunks",
}
_ROLES = ("rollout", "teacher", "arbiter", "feeder")
Times = dict[tuple[str, str, int], int]


def bus(config: Config, repeats: int, *, rate: float | None = None) -> dict[str, Any]:
    """Chunks a second and latencies, with as many workers as the config has. `rate`: chunks a second that are offered
    whether or not earlier ones are scored (as far as `rollout.max_unscored_chunks` allows); None: as fast as it goes,
    and then latencies are mostly those of queues."""
    recorded = record(config, _RECORDED)
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        server = EmbeddedRedis(Path(folder) / "redis", maxmemory_mb=1024)
        server.start()
        try:
            there = with_redis(_endless(config, folder), server.url, None)
            marks = _run(there, recorded, repeats, rate)
        finally:
            server.stop()
        found = _measured(there.run_dir, marks)
    return {
        "what": "chunks through the roles",
        "rate": rate,
        "chunk_tokens": config.rollout.chunk_tokens,
        "mean_chunk_tokens": sum(one.tokens for one in recorded) / sum(len(one.chunks) for one in recorded),
        "slots": config.most_slots,
        "workers": {"rollout": config.rollout.workers, "teacher": config.only_teacher.workers},
        **{name: spread([one[name] for one in found]) for name in found[0]},
        "figures": _FIGURES,
        "machine": machine(),
    }


def _endless(config: Config, folder: str) -> Config:
    """The config without an end. The trace has the times."""
    learner = config.learner.model_copy(update={"max_steps": 1_000_000, "max_generated_tokens": None})
    changes = {"name": "bench", "runs_dir": folder, "trace": True, "learner": learner, "deterministic": False}
    return config.model_copy(update=changes)


@dataclass(frozen=True, slots=True)
class _Mark:
    """Between two repeats: microseconds since 1970, and counts that grow, of processor seconds and bytes."""

    at_us: int
    cpu_s: dict[str, float]
    redis_bytes: dict[str, float]


def _run(config: Config, recorded: list[RecordedRollout], repeats: int, rate: float | None) -> list[_Mark]:
    """Run all roles; returns the marks before, between and after the repeats."""
    run_key = new_run_key(config.name)
    client: Any = connect(str(config.redis.url))
    create_run(client, config, run_key)
    plane = open_plane(config, client, run_key)
    lease = Lease(plane, "learner", 3600.0)
    lease.acquire(threading.Event())
    # With the first version past the warm-up, the policy is active as soon as it is calibrated.
    version = config.termination.warmup_steps
    ref = publish(config.run_dir / WEIGHTS, version, lambda path: save_file({"none": zeros(1)}, path))
    lease.call(scripts.publish(version, 0, ref.file, ref.sha256))
    vocab_size, stops = check_pair(config).vocab_size, len(check_pair(config).stop_ids)
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    each = None if rate is None else rate / config.rollout.workers
    rows: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_feeder, (recorded,)), (_arbiter, ())]
    rows += [(_rollout, (recorded, each, number)) for number in range(config.rollout.workers)]
    rows += [(_teacher, (recorded, vocab_size, stops, number)) for number in range(config.only_teacher.workers)]
    used = [(serve.__name__.removeprefix("_"), context.Value("d", 0.0, lock=False)) for serve, _ in rows]
    processes = [
        context.Process(target=_serve, args=(serve, config.to_yaml(), run_key, over, cpu, *args))
        for (serve, args), (_, cpu) in zip(rows, used, strict=True)
    ]
    for process in processes:
        process.start()
    trainer = _Trainer(config, plane, lease, vocab_size)
    try:
        deadline = time.monotonic() + _START_S
        while trainer.steps == 0:
            trainer.train(0.1)
            if time.monotonic() > deadline or any(process.exitcode is not None for process in processes):
                raise RuntimeError("a role ended, or none of them got to work")
        trainer.train(_WARM_UP_S)
        marks = [_mark(client, used)]
        for _ in range(repeats):
            trainer.train(_MEASURE_S)
            marks.append(_mark(client, used))
        return marks
    finally:
        over.set()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
        client.close()


def _mark(client: Any, used: list[tuple[str, Any]]) -> _Mark:
    cpu, stats = client.info("cpu"), client.info("stats")
    seconds = {role: sum(value.value for name, value in used if name == role) for role in _ROLES}
    seconds["redis"] = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
    received_and_sent = {"in": stats["total_net_input_bytes"], "out": stats["total_net_output_bytes"]}
    return _Mark(time.time_ns() // 1000, seconds, received_and_sent)


class _Trainer:
    """In place of a learner: reads trajectories as the real one does, and counts each batch as trained."""

    def __init__(self, config: Config, plane: Plane, lease: Lease, vocab_size: int) -> None:
        self._size, self._lease, self.steps = config.learner.batch_size, lease, 0
        self._version = config.termination.warmup_steps
        self._intake = Intake(plane, lease, max_staleness=config.learner.max_staleness, vocab_size=vocab_size)
        self._intake.recover(())

    def train(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            batch = self._intake.batch(self._size, self._version, 0.05)
            if batch is None:
                continue
            self.steps += 1
            self._lease.advance("step", self.steps)
            self._lease.advance("covered", self.steps)
            self._intake.settle([Ending(one.entry, one.trajectory.rid, "trained", staleness=0) for one in batch])


# --- the roles, each in a process of its own ---------------------------------------------------------------------


def _serve(serve: Callable[..., None], config_yaml: str, run_key: str, over: Event, cpu: Any, *args: Any) -> None:
    config, stop = parse(config_yaml), threading.Event()
    threading.Thread(target=_pass_on, args=(over, stop, cpu), daemon=True).start()
    plane = open_plane(config, connect(str(config.redis.url)), run_key, stop)
    with tracing.of_role(config, serve.__name__.removeprefix("_")):
        serve(config, plane, stop, *args)


def _pass_on(over: Event, stop: threading.Event, cpu: Any) -> None:
    while not over.wait(0.05):
        cpu.value = time.process_time()
    stop.set()


def _feeder(config: Config, plane: Plane, stop: threading.Event, recorded: list[RecordedRollout]) -> None:
    Feeder(config, plane, ReplayedPrompts(recorded), stop).run()


def _arbiter(config: Config, plane: Plane, stop: threading.Event) -> None:
    Arbiter(config, plane, stop).run()


def _rollout(
    config: Config,
    plane: Plane,
    stop: threading.Event,
    recorded: list[RecordedRollout],
    rate: float | None,
    number: int,
) -> None:
    engine: Any = ReplayedDecoder(recorded, config.most_slots, rate)
    RolloutWorker(config, plane, engine, worker=f"rollout-bench-{number}", stop=stop).serve(time.monotonic() + 3600)


def _teacher(
    config: Config,
    plane: Plane,
    stop: threading.Event,
    recorded: list[RecordedRollout],
    vocab_size: int,
    stop_count: int,
    number: int,
) -> None:
    engine: Any = ReplayedScorer(recorded, config.only_teacher.slots)
    name = f"teacher-bench-{number}"
    worker = TeacherWorker(config, plane, engine, vocab_size=vocab_size, stop_count=stop_count, worker=name, stop=stop)
    worker.serve(time.monotonic() + 3600)


# --- the times ---------------------------------------------------------------------------------------------------


def _measured(run: Path, marks: list[_Mark]) -> list[dict[str, float]]:
    """The figures of each repeat: of what was scored, seen and judged in it."""
    stages: dict[str, list[TracedStage]] = {"closed": [], "scored": [], "seen": [], "verdict": []}
    for trace in read_traces(run):
        for stage in trace.stages:
            if stage.stage in stages:
                stages[stage.stage].append(stage)
    # A verdict names no chunk, but how many tokens it covers.
    closed = {(one.rid, name, one.facts[name]): one.at_us for one in stages["closed"] for name in ("seq", "tokens")}
    return [_between(stages, closed, first, second) for first, second in pairwise(marks)]


def _between(stages: dict[str, list[TracedStage]], closed: Times, first: _Mark, second: _Mark) -> dict[str, float]:
    begin, end = first.at_us, second.at_us
    chunks = sum(begin <= one.at_us < end for one in stages["scored"])
    figures = {"chunks_per_s": chunks / (end - begin) * 1e6}
    for name, by in (("scored", "seq"), ("seen", "seq"), ("verdict", "tokens")):
        waits = [
            (one.at_us - closed[one.rid, by, one.facts[by]]) / 1e3
            for one in stages[name]
            if begin <= one.at_us < end and (one.rid, by, one.facts[by]) in closed
        ]
        for level in (50, 99):
            figures[f"{name}_ms_p{level}"] = float(np.percentile(waits, level)) if waits else float("nan")
    for name, seconds in second.cpu_s.items():
        figures[f"cpu_us_{name}"] = (seconds - first.cpu_s[name]) / max(1, chunks) * 1e6
    for name, count in second.redis_bytes.items():
        figures[f"redis_bytes_{name}"] = (count - first.redis_bytes[name]) / max(1, chunks)
    return figures
