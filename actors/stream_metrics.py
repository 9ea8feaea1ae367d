"""Gauges that the feeder sets: limits of the run, live workers, streams, memory of Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from common import metrics
from common.config import Config
from common.teachers import in_lane
from common.wire.plane import Backlog


def show_limits(config: Config) -> None:
    """Set the limits with which alerts compare."""
    values = {
        "max_staleness": config.learner.max_staleness,
        "weight_sync_steps": config.learner.weight_sync_steps,
        "max_steps": config.learner.max_steps,
        "batch_size": config.learner.batch_size,
        "checkpoint_steps": config.checkpoints.every_steps,
        "chunk_tokens": config.rollout.chunk_tokens,
        "max_completion_length": config.rollout.max_completion_length,
        "control_fraction": config.termination.control_fraction,
    }
    for kind, value in values.items():
        metrics.config_value.labels(kind).set(value)


def show_workers(live: Mapping[str, Mapping[str, str]], teachers: Iterable[str]) -> None:
    """Set the number of live workers. `teachers`: names, as `Config.all_teachers`."""
    seen = Counter((facts.get("role"), facts.get("teacher", "")) for facts in live.values())
    metrics.workers_live.labels("rollout", "").set(seen["rollout", ""])
    for teacher in teachers:
        metrics.workers_live.labels("teacher", teacher).set(seen["teacher", teacher])


def show_backlog(backlog: Backlog) -> None:
    """Set memory of Redis, dead letters, and by stream the outstanding entries and the age of the oldest pending one.

    The shards of a teacher's chunks are one stream here.
    """
    if backlog.memory is not None:
        limit = backlog.memory.get("maxmemory") or float("inf")
        metrics.redis_memory.set(backlog.memory["used_memory"] / limit)
        metrics.config_value.labels("redis_maxmemory_bytes").set(limit)
    if backlog.dead is not None:
        metrics.stream_outstanding.labels("dead", "").set(backlog.dead)
    length: Counter[tuple[str, str]] = Counter()
    oldest: dict[tuple[str, str], float] = {}
    for name, (size, oldest_s) in backlog.streams.items():
        stream = name.partition(":")[0], in_lane(name)[1]
        length[stream] += size
        oldest[stream] = max(oldest.get(stream, 0.0), oldest_s)
    for stream in oldest:
        metrics.stream_outstanding.labels(*stream).set(length[stream])
        metrics.stream_oldest_pending.labels(*stream).set(oldest[stream])
