"""The metrics: their names, types and labels, and that they are served."""

from __future__ import annotations

import re
import socket
import urllib.request

import pytest

from common import metrics

LENGTHS = [float(2**power) for power in range(4, 16)]
# name: (type, labels)
EXPECTED = {
    "rollouts_finished": ("counter", ("arm", "reason")),
    "rollout_tokens_generated": ("counter", ("arm",)),
    "rollout_tokens_trained": ("counter", ("arm",)),
    "rollout_tokens_detection": ("counter", ("arm",)),
    "rollout_tokens_overshoot": ("counter", ("arm",)),
    "rollout_length_tokens": ("histogram", ("arm", "reason")),
    "rollout_kept_tokens": ("histogram", ("arm", "reason")),
    "chunks_sent": ("counter", ()),
    "chunks_scored": ("counter", ()),
    "chunks_fenced": ("counter", ()),
    "chunks_duplicate": ("counter", ()),
    "stop_signals": ("counter", ("reason",)),
    "stop_latency_seconds": ("histogram", ()),
    "stop_overshoot_tokens": ("histogram", ()),
    "chunk_score_seconds": ("histogram", ()),
    "token_divergence_nats": ("histogram", ()),
    "kat_threshold_nats": ("gauge", ()),
    "kat_buffer_size": ("gauge", ()),
    "kat_cut_rate": ("gauge", ()),
    "policy_version": ("gauge", ("role",)),
    "policy_lag_versions": ("histogram", ("role",)),
    "learner_step_seconds": ("histogram", ()),
    "learner_steps": ("counter", ()),
    "learner_loss_nats": ("gauge", ()),
    "learner_idle_ratio": ("gauge", ()),
    "trajectories_dropped": ("counter", ("reason",)),
    "stream_outstanding": ("gauge", ("stream",)),
    "stream_oldest_pending_seconds": ("gauge", ("stream",)),
    "claims": ("counter", ("stream",)),
    "dead_letters": ("counter", ("reason",)),
    "redis_errors": ("counter", ("kind",)),
    "slots_busy": ("gauge", ("role",)),
    "slots_total": ("gauge", ("role",)),
    "decode_tokens": ("counter", ("role",)),
    "engine_step_seconds": ("histogram", ("role",)),
}


def declared() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name without prefix → type and labels, as the registry's collectors state them."""
    found = {}
    for collector in set(metrics.REGISTRY._collector_to_names):
        name = collector._name.removeprefix("katana_")
        found[name] = (collector._type, tuple(collector._labelnames))
    return found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_metric_has_its_type_and_labels(name: str) -> None:
    assert declared()[name] == EXPECTED[name]


def test_every_name_has_the_prefix_and_no_label_can_grow_without_end() -> None:
    for collector in metrics.REGISTRY._collector_to_names:
        assert collector._name.startswith("katana_")
        assert set(collector._labelnames) <= {"role", "arm", "reason", "stream", "kind"}


def test_what_is_counted_is_served() -> None:
    metrics.rollouts_finished.labels("treated", "test_served").inc(3)
    metrics.rollout_length.labels("treated", "test_served").observe(100)
    port = metrics.serve("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'katana_rollouts_finished_total{arm="treated",reason="test_served"} 3.0' in text
    buckets = r"katana_rollout_length_tokens_bucket\{arm=\"treated\",le=\"([^\"]+)\",reason=\"test_served\"\} (\S+)"
    found = re.findall(buckets, text)
    assert found == [(str(edge), "1.0" if edge >= 100 else "0.0") for edge in LENGTHS] + [("+Inf", "1.0")]
    assert "python_info" not in text


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            metrics.serve("127.0.0.1", taken.getsockname()[1])
