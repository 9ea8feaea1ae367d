"""Gauges that the feeder sets: the run's limits, workers that are live, streams and Redis's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from common import metrics
from common.config import Config
from common.wire.plane import Backlog


def show_limits(config: Config) -> None:
    """What alerts compare with."""
    values = {
        "max_staleness": config.learner.max_staleness,
        "max_steps": config.learner.max_steps,
        "batch_size": config.learner.batch_size,
        "checkpoint_steps": config.checkpoints.every_steps,
        "chunk_tokens": config.rollout.chunk_tokens,
        "max_completion_length": config.rollout.max_completion_length,
        "control_fraction": config.termination.control_fraction,
    }
    for kind, value in values.items():
        metrics.config_value.labels(kind).set(value)


def show_workers(live: Mapping[str, Mapping[str, str]]) -> None:
    for role in ("rollout", "teacher"):
        metrics.workers_live.labels(role).set(sum(facts.get("role") == role for facts in live.values()))


def show_backlog(backlog: Backlog) -> None:
    """Entries outstanding and the age of the oldest pending one, by stream; all shards of chunks together.

    Redis's memory and the dead letters with them.
    """
    if backlog.memory is not None:
        limit = backlog.memory.get("maxmemory") or float("inf")
        metrics.redis_memory.set(backlog.memory["used_memory"] / limit)
        metrics.config_value.labels("redis_maxmemory_bytes").set(limit)
    if backlog.dead is not None:
        metrics.stream_outstanding.labels("dead").set(backlog.dead)
    length: Counter[str] = Counter()
    oldest: dict[str, float] = {}
    for name, (size, oldest_s) in backlog.streams.items():
        stream = name.partition(":")[0]
        length[stream] += size
        oldest[stream] = max(oldest.get(stream, 0.0), oldest_s)
    for stream in oldest:
        metrics.stream_outstanding.labels(stream).set(length[stream])
        metrics.stream_oldest_pending.labels(stream).set(oldest[stream])
