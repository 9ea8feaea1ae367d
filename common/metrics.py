"""Every Prometheus metric, in one registry, declared once. Each process serves its own port.

Loops never ask whether metrics are on: counting is always safe and cheap, serving is what a process may leave out.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

REGISTRY = CollectorRegistry()
_LENGTHS = tuple(float(2**n) for n in range(4, 16))
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_NATS = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace="katana", registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, labels, namespace="katana", registry=REGISTRY)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(name, text, labels, namespace="katana", registry=REGISTRY, buckets=buckets)


# Feeder, from the books: these agree with summary.json over restarts.
rollouts_finished = _counter("rollouts_finished_total", "Rollouts booked, by how they ended", "arm", "reason")
tokens_generated = _counter("rollout_tokens_generated_total", "Tokens written in booked rollouts", "arm")
tokens_trained = _counter("rollout_tokens_trained_total", "Tokens trained on", "arm")
tokens_detection = _counter("rollout_tokens_detection_total", "Tokens between the cut and its detection", "arm")
tokens_overshoot = _counter("rollout_tokens_overshoot_total", "Tokens written after the detection", "arm")
rollout_length = _histogram("rollout_length_tokens", "Tokens written in a rollout", _LENGTHS, "arm", "reason")
rollout_kept = _histogram("rollout_kept_tokens", "Tokens kept of a rollout", _LENGTHS, "arm", "reason")
trajectories_dropped = _counter("trajectories_dropped_total", "Rollouts dropped, by reason", "reason")
stream_outstanding = _gauge("stream_outstanding", "Entries of a stream not yet taken off", "stream")
stream_oldest_pending = _gauge("stream_oldest_pending_seconds", "Age of the oldest pending entry", "stream")

# Rollout and teacher workers.
chunks_sent = _counter("chunks_sent_total", "Chunks stored by rollout workers")
chunks_scored = _counter("chunks_scored_total", "Chunks scored by teacher workers")
chunks_fenced = _counter("chunks_fenced_total", "Chunks refused: no longer the owner, or the rollout has ended")
chunks_duplicate = _counter("chunks_duplicate_total", "Chunks scored a second time, without effect")
chunk_score_seconds = _histogram("chunk_score_seconds", "Time to score one batch of chunks", _SECONDS)
token_divergence = _histogram("token_divergence_nats", "Reverse KL per token on the support", _NATS)
slots_busy = _gauge("slots_busy", "Slots of the engine in use", "role")
slots_total = _gauge("slots_total", "Slots of the engine", "role")
decode_tokens = _counter("decode_tokens_total", "Tokens through the engine", "role")
engine_step_seconds = _histogram("engine_step_seconds", "Time of one engine step", _SECONDS, "role")
policy_version = _gauge("policy_version", "Policy version in use", "role")
claims = _counter("claims_total", "Entries taken over from a silent consumer", "stream")
busy_ratio = _gauge("busy_ratio", "Share of time a role spends at work", "role")

# Arbiter.
stop_signals = _counter("stop_signals_total", "Stop signals sent", "reason")
stop_latency = _histogram("stop_latency_seconds", "From a score's notice to the verdict it led to", _SECONDS)
stop_overshoot = _histogram("stop_overshoot_tokens", "Tokens written after the detection", _LENGTHS)
kat_threshold = _gauge("kat_threshold_nats", "Threshold for new rollouts; NaN while inactive")
kat_buffer_size = _gauge("kat_buffer_size", "Window minima in the buffer")
kat_cut_rate = _gauge("kat_cut_rate", "Share cut among the last 256 treated verdicts")

# Learner.
policy_lag = _histogram("policy_lag_versions", "Staleness of trained trajectories", _VERSIONS, "role")
learner_step_seconds = _histogram("learner_step_seconds", "Time of one optimizer step", _SECONDS)
learner_steps = _counter("learner_steps_total", "Optimizer steps")
learner_loss = _gauge("learner_loss_nats", "Loss of the last step")
learner_idle = _gauge("learner_idle_ratio", "Share of time the learner waits for trajectories")

# Everyone.
dead_letters = _counter("dead_letters_total", "Records given up", "reason")
redis_errors = _counter("redis_errors_total", "Failed calls to Redis", "kind")


def serve(host: str, port: int) -> int:
    """Serve the registry over HTTP; returns the port (a free one for 0). Raises OSError if it is taken."""
    server: Any = start_http_server(port, addr=host, registry=REGISTRY)[0]
    return int(server.server_port)
