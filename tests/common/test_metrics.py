"""The metrics: their names, types and labels, and that they are served."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import Histogram

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
    "chunks_refused": ("counter", ()),
    "chunks_duplicate": ("counter", ()),
    "fired_position_tokens": ("histogram", ("arm",)),
    "stop_signals": ("counter", ("reason",)),
    "stop_latency_seconds": ("histogram", ()),
    "stop_overshoot_tokens": ("histogram", ("arm",)),
    "chunk_score_seconds": ("histogram", ()),
    "token_divergence_nats": ("histogram", ()),
    "kat_threshold_nats": ("gauge", ("teacher",)),
    "kat_buffer_size": ("gauge", ("teacher",)),
    "kat_cut_rate": ("gauge", ()),
    "vllm_up": ("gauge", ()),
    "vllm_tokens_refused": ("counter", ()),
    "policy_version": ("gauge", ("role",)),
    "policy_lag_versions": ("histogram", ("role",)),
    "learner_step_seconds": ("histogram", ()),
    "learner_steps": ("counter", ()),
    "learner_loss_nats": ("gauge", ()),
    "learner_idle_ratio": ("gauge", ()),
    "learner_reward_mean": ("gauge", ()),
    "learner_reward_signal_ratio": ("gauge", ()),
    "learner_groups_without_reward": ("counter", ("reason",)),
    "trajectories_dropped": ("counter", ("reason",)),
    "ended_length_tokens": ("histogram", ("reason",)),
    "ended_trainable_tokens": ("histogram", ("reason",)),
    "stream_outstanding": ("gauge", ("stream", "teacher")),
    "stream_oldest_pending_seconds": ("gauge", ("stream", "teacher")),
    "rollouts_open": ("gauge", ()),
    "workers_live": ("gauge", ("role", "teacher")),
    "redis_memory_ratio": ("gauge", ()),
    "config_value": ("gauge", ("kind",)),
    "learner_tokens": ("counter", ()),
    "eval_avg_at_k": ("gauge", ()),
    "eval_pass_at_k": ("gauge", ()),
    "eval_mean_length_tokens": ("gauge", ()),
    "loop_timestamp_seconds": ("gauge", ("role",)),
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
        assert set(collector._labelnames) <= {"role", "arm", "reason", "stream", "kind", "teacher"}


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


def test_many_values_at_a_time_are_counted_as_one_by_one() -> None:
    bounds = (0.001, 0.03, 1.0)
    one_by_one = Histogram("one", "", registry=None, buckets=bounds)
    at_once = metrics.HistogramOfMany("many", "", registry=None, buckets=bounds)
    values = np.array([0.0, 0.001, 0.0010001, 0.03, 0.5, 1.0, 9.0, 9.0], np.float32)
    for value in values.tolist():
        one_by_one.observe(value)
    at_once.observe_all(values)
    at_once.observe_all(values[:0])

    def counted(histogram: Histogram) -> list[tuple[str, dict[str, str], float]]:
        [family] = histogram.collect()
        kept = [one for one in family.samples if not one.name.endswith("_created")]
        return [(one.name.partition("_")[2], one.labels, pytest.approx(one.value)) for one in kept]

    assert counted(at_once) == counted(one_by_one)
    assert len(counted(at_once)) == len(bounds) + 3


def served(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_run", "")
    monkeypatch.setattr(metrics, "_address", "")


@pytest.mark.usefixtures("no_run")
def test_every_series_carries_its_run_while_there_is_one(tmp_path: Path) -> None:
    port = metrics.serve("127.0.0.1", 0)
    metrics.stop_signals.labels("test_run").inc()
    assert 'katana_stop_signals_total{reason="test_run"} 1.0' in served(port)
    with metrics.of_run("mine", "arbiter", tmp_path / "mine"):
        lines = [line for line in served(port).splitlines() if line.startswith("katana_")]
    assert 'katana_stop_signals_total{reason="test_run",run="mine"} 1.0' in lines
    assert lines and all('run="mine"' in line for line in lines)


@pytest.mark.usefixtures("no_run")
def test_a_process_says_where_it_serves_and_takes_that_back(tmp_path: Path) -> None:
    port = metrics.serve("127.0.0.1", 0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / ".targets"
    folder.mkdir()
    stale = folder / f"other--teacher-{socket.gethostname()}-{gone.pid}.json"
    elsewhere = folder / f"other--teacher-{socket.gethostname()}-1-{gone.pid}.json"  # the host of a longer name
    alive = folder / f"other--teacher-{socket.gethostname()}-{os.getppid()}.json"
    for path in (stale, elsewhere, alive):
        path.write_text("[]")
    began = time.time()
    with metrics.of_run("mine", "rollout", tmp_path / "mine"):
        (mine,) = set(folder.iterdir()) - {elsewhere, alive}
        assert mine.name.startswith("mine--rollout-")
        where = {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "rollout", "run": "mine"}}
        assert json.loads(mine.read_text()) == [where]
        assert metrics.REGISTRY.get_sample_value("katana_loop_timestamp_seconds", {"role": "rollout"}) >= began
    assert set(folder.iterdir()) == {elsewhere, alive}
    assert metrics.REGISTRY.get_sample_value("katana_loop_timestamp_seconds", {"role": "rollout"}) == 0


@pytest.mark.usefixtures("no_run")
def test_a_folder_that_cannot_be_written_to_does_not_end_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.serve("127.0.0.1", 0)
    (tmp_path / ".targets").write_text("a file, not a folder")
    with metrics.of_run("mine", "rollout", tmp_path / "mine"):
        pass
    assert "Prometheus will not find this process" in caplog.text


def test_a_process_waits_for_the_last_look_of_one_who_has_been_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    port = metrics.serve("127.0.0.1", 0)
    stop = threading.Event()
    monkeypatch.setattr(metrics, "_collected_at", float("-inf"))
    metrics.last_look(stop, at_most_s=60)  # nobody looks: nobody is waited for
    served(port)
    looks = threading.Timer(0.3, served, [port])
    looks.start()
    began = time.monotonic()
    metrics.last_look(stop, at_most_s=60)
    assert 0.2 < time.monotonic() - began < 30
    looks.join()
    stop.set()
    metrics.last_look(stop, at_most_s=60)  # told to stop: not a moment more


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            metrics.serve("127.0.0.1", taken.getsockname()[1])
