"""Every Prometheus metric, in one registry, declared once. Each process serves its own port.

Loops never ask whether metrics are on: counting is always safe and cheap; only serving is optional.
Every series is served with the label `run`, those of a worker of one of several teachers also with `teacher`; the role
is Prometheus's label `job`. Names contain the unit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    start_http_server,
)

log = logging.getLogger("katana.metrics")
REGISTRY = CollectorRegistry()
TARGETS = ".targets"
_LENGTHS = tuple(float(2**n) for n in range(4, 16))
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_NATS = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)


class HistogramOfMany(Histogram):
    """A histogram that takes many values at a time: one by one they cost more than the work that they are about."""

    def observe_all(self, amounts: npt.NDArray[np.floating]) -> None:
        """As `observe` of each of `amounts`, float [n], finite."""
        places = np.searchsorted(self._upper_bounds, amounts)  # the first bucket whose bound is not below
        for place, count in enumerate(np.bincount(places).tolist()):
            if count:
                self._buckets[place].inc(count)
        self._sum.inc(float(amounts.sum(dtype=np.float64)))


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace="katana", registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace="katana", registry=REGISTRY)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(name, text, labels, namespace="katana", registry=REGISTRY, buckets=buckets)


# Feeder, from the books: these agree with summary.json across restarts.
rollouts_finished = _counter("rollouts_finished_total", "Rollouts booked, by ending", "arm", "reason")
tokens_generated = _counter("rollout_tokens_generated_total", "Tokens written in booked rollouts", "arm")
tokens_trained = _counter("rollout_tokens_trained_total", "Tokens trained on", "arm")
tokens_detection = _counter("rollout_tokens_detection_total", "Tokens between the cut and its detection", "arm")
tokens_overshoot = _counter("rollout_tokens_overshoot_total", "Tokens written after the detection", "arm")
# Only rollouts that count in the comparison of the arms: the saving of these is the one in summary.json.
rollout_length = _histogram("rollout_length_tokens", "Tokens written, compared rollouts", _LENGTHS, "arm", "reason")
rollout_kept = _histogram("rollout_kept_tokens", "Tokens kept, compared rollouts", _LENGTHS, "arm", "reason")
trajectories_dropped = _counter("trajectories_dropped_total", "Rollouts dropped, by reason", "reason")
# By ending: trained, dead, or the reason of a drop. Long rollouts are dropped as stale more often than short ones;
# these show how much longer they were than the trained ones.
ended_length = _histogram("ended_length_tokens", "Tokens written, by ending", _LENGTHS, "reason")
ended_trainable = _histogram("ended_trainable_tokens", "Tokens to train on, by ending", _LENGTHS, "reason")
# Chunks and teacher workers by teacher, if there are several; Prometheus has no label with an empty value.
stream_outstanding = _gauge("stream_outstanding", "Entries of a stream not yet removed", "stream", "teacher")
stream_oldest_pending = _gauge("stream_oldest_pending_seconds", "Age of the oldest pending entry", "stream", "teacher")
rollouts_open = _gauge("rollouts_open", "Rollouts admitted and not booked")
workers_live = _gauge("workers_live", "Workers with recent heartbeats", "role", "teacher")
redis_memory = _gauge("redis_memory_ratio", "Memory of the data Redis divided by its maxmemory; 0 without one")
config_value = _gauge("config_value", "Values of the run's config, for alerts that compare with them", "kind")

# Rollout and teacher workers.
chunks_sent = _counter("chunks_sent_total", "Chunks stored by rollout workers")
chunks_scored = _counter("chunks_scored_total", "Chunks scored by teacher workers")
chunks_fenced = _counter("chunks_fenced_total", "Chunks refused: no longer the owner, or the rollout has ended")
chunks_refused = _counter("chunks_refused_total", "Times that a full Redis refused a chunk; the chunk waits")
chunks_duplicate = _counter("chunks_duplicate_total", "Chunks scored a second time, without effect")
chunk_score_seconds = _histogram("chunk_score_seconds", "Time to score one batch of chunks", _SECONDS)
slots_busy = _gauge("slots_busy", "Slots of the engine in use", "role")
slots_total = _gauge("slots_total", "Slots of the engine", "role")
decode_tokens = _counter("decode_tokens_total", "Tokens through the engine", "role")
rebuilt_tokens = _counter(
    "rebuilt_tokens_total", "Tokens that a teacher forwarded again because its cache no longer held them"
)
engine_step_seconds = _histogram("engine_step_seconds", "Time of one engine step", _SECONDS, "role")
# A worker in front of a vLLM server; NaN without one.
vllm_up = _gauge("vllm_up", "1 while a rollout worker's vLLM server can be used, 0 while it cannot")
vllm_up.set(float("nan"))
vllm_tokens_refused = _counter(
    "vllm_tokens_refused_total",
    "Tokens that a vLLM server wrote with weights that are not of the run",
)
policy_version = _gauge("policy_version", "Policy version in use", "role")
claims = _counter("claims_total", "Entries taken over from a silent consumer", "stream")
busy_ratio = _gauge("busy_ratio", "Share of time a role is busy", "role")

# Arbiter.
fired_position = _histogram(
    "fired_position_tokens", "Tokens seen when the policy fired, applied or not, in judged rollouts", _LENGTHS, "arm"
)
stop_signals = _counter("stop_signals_total", "Stop signals sent", "reason")
stop_latency = _histogram("stop_latency_seconds", "From a score's notice to the resulting verdict", _SECONDS)
# From the books, and so with a label: a series without one is served as 0 before they are read, and would seem to jump.
stop_overshoot = _histogram("stop_overshoot_tokens", "Tokens written after the detection", _LENGTHS, "arm")
token_divergence = HistogramOfMany(
    "token_divergence_nats",
    "Reverse KL per token of judged rollouts",
    namespace="katana",
    registry=REGISTRY,
    buckets=_NATS,
)
kat_threshold = _gauge("kat_threshold_nats", "Threshold for new rollouts; NaN while inactive", "teacher")
kat_buffer_size = _gauge("kat_buffer_size", "Window minima in the buffer", "teacher")
kat_cut_rate = _gauge(
    "kat_cut_rate", "Share of the last 256 treated, active rollouts in which the policy fired, applied or not"
)

# Learner.
policy_lag = _histogram("policy_lag_versions", "Staleness of trained trajectories", _VERSIONS, "role")
learner_step_seconds = _histogram("learner_step_seconds", "Time of one optimizer step", _SECONDS)
learner_steps = _counter("learner_steps_total", "Optimizer steps")
learner_tokens = _counter("learner_tokens_total", "Tokens trained on by this process")
learner_loss = _gauge("learner_loss_nats", "Loss of the last step")
learner_entropy = _gauge("learner_entropy_nats", "Mean entropy of the student over the tokens of the last step")
learner_drift = _gauge("learner_drift_ratio", "Drift guards of the last step that had them: shares, by kind", "kind")
learner_threshold = _gauge("learner_threshold_nats", "Mean threshold of the rollouts of the last step; NaN without one")
learner_threshold.set(float("nan"))
# Only in a run with `reward.mode`: NaN in others, and until a step has the figure.
reward_mean = _gauge("learner_reward_mean", "Mean reward of the rollouts of the last step, by the verifier")
reward_signal = _gauge("learner_reward_signal_ratio", "Share of the groups of the last step whose rewards differ")
for _of_rewards in (reward_mean, reward_signal):
    _of_rewards.set(float("nan"))
groups_without_reward = _counter(
    "learner_groups_without_reward_total", "Groups that were trained without reward, by reason", "reason"
)
learner_idle = _gauge("learner_idle_ratio", "Share of time the learner waits for trajectories")

# Evaluator: the newest version that was measured.
eval_avg_at_k = _gauge("eval_avg_at_k", "Mean accuracy on the held-out problems")
eval_pass_at_k = _gauge("eval_pass_at_k", "Share of held-out problems that one of k tries solves")
eval_mean_length = _gauge("eval_mean_length_tokens", "Mean length of a held-out completion")

# Everyone.
loop_timestamp = _gauge(
    "loop_timestamp_seconds", "Unix time of the loop's last iteration; 0 between two worker tasks", "role"
)
dead_letters = _counter("dead_letters_total", "Records given up", "reason")
redis_errors = _counter("redis_errors_total", "Failed calls to Redis", "kind")


_run = ""
_teacher = ""
_address = ""
_collected_at = float("-inf")  # monotonic


class _OfRun:
    """The registry with the label `run` on every sample, so that scrape targets need no label; and `teacher`, if this
    process is a worker of one of several."""

    def collect(self) -> Iterator[Metric]:
        global _collected_at
        _collected_at = time.monotonic()
        for family in REGISTRY.collect():
            if _run:
                own = {"run": _run, **({"teacher": _teacher} if _teacher else {})}
                family.samples = [one._replace(labels={**one.labels, **own}) for one in family.samples]
            yield family

    def describe(self) -> list[Metric]:
        return []


_SERVED = CollectorRegistry()
_SERVED.register(_OfRun())
ProcessCollector(registry=_SERVED)  # process_resident_memory_bytes, process_cpu_seconds_total …


def serve(host: str, port: int) -> int:
    """Serve the registry over HTTP; returns the port (a free one for 0). Raises OSError if it is taken."""
    global _address
    server: Any = start_http_server(port, addr=host, registry=_SERVED)[0]
    reached_at = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    _address = f"{reached_at}:{server.server_port}"
    return int(server.server_port)


def last_look(stop: threading.Event, at_most_s: float = 15.0) -> None:
    """Before a process ends: wait until its final values are scraped, if it has been scraped recently.

    So Prometheus and `summary.json` agree on a finished run.
    """
    began = time.monotonic()
    while began - 60 < _collected_at < began and time.monotonic() < began + at_most_s:
        if stop.wait(0.1):
            return


def turned(role: str) -> None:
    """Record an iteration of a role's loop; `katana health` and the alerts use the time of the last one."""
    loop_timestamp.labels(role).set(time.time())


@contextlib.contextmanager
def of_run(name: str, role: str, folder: Path, teacher: str = "") -> Iterator[None]:
    """Serve as this role of this run (of several teachers as a worker of one), and write the address to `.targets/`
    beside the runs' folders, for file_sd.

    All runs share that folder: Prometheus allows a wildcard only in the last part of a path.

    If the folder cannot be written to, that is logged and the work continues.
    """
    global _run, _teacher
    _run, _teacher = name, teacher
    path = folder.parent / TARGETS / f"{name}--{role}-{socket.gethostname()}-{os.getpid()}.json"
    try:
        if _address:
            _put(path, [{"targets": [_address], "labels": {"job": role, "run": name}}])
        turned(role)
        yield
    finally:
        loop_timestamp.labels(role).set(0)
        busy_ratio.labels(role).set(0)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _put(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path.parent)
        draft.write_text(json.dumps(value))
        draft.replace(path)
    except OSError as error:
        log.warning("%s: not written (%s); Prometheus will not find this process there", path, error)


def _remove_dead(folder: Path) -> None:
    """Remove files of this host's dead processes: one that was killed could not remove its own."""
    mine = re.compile(rf".+--[a-z]+-{re.escape(socket.gethostname())}-([0-9]{{1,9}})\.json")
    for path in folder.iterdir():
        named = mine.fullmatch(path.name)
        if named and not _lives(int(named[1])):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
