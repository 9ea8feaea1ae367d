"""`katana health`: nothing wrong with a role that works, the reason for one that does not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import Run

from common import metrics
from common.config import Config, ConfigError
from ops.reach.embedded import EmbeddedRedis
from ops.run.health import health


@pytest.fixture
def config(
    embedded_redis: EmbeddedRedis, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    monkeypatch.setattr(metrics, "_run", "")
    monkeypatch.setattr(metrics, "_address", "")
    port = metrics.serve("127.0.0.1", 0)

    def make(**redis: str) -> Config:
        urls = {"url": embedded_redis.url, "broker_url": embedded_redis.broker_url} | redis
        return start(embedded_redis, redis=urls, metrics={"host": "0.0.0.0", "port": port}).config

    return make


def test_a_role_whose_loop_runs_is_healthy(config: Callable[..., Config], tmp_path: Path) -> None:
    with metrics.of_run("mine", "arbiter", tmp_path / "mine"):
        assert health("arbiter", config(), within_s=60) == []


def test_a_role_whose_loop_has_stopped_is_not_healthy(config: Callable[..., Config], tmp_path: Path) -> None:
    with metrics.of_run("mine", "learner", tmp_path / "mine"):
        metrics.loop_timestamp.labels("learner").set(time.time() - 100)
        assert health("learner", config(), within_s=60) == ["the last iteration of the learner's loop was 100 s ago"]
        assert health("learner", config(), within_s=200) == []


def test_a_worker_without_a_task_is_healthy_and_a_learner_without_a_loop_is_not(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    for role in ("teacher", "learner"):
        with metrics.of_run("mine", role, tmp_path / "mine"):
            pass
    assert health("teacher", config(), within_s=60) == []
    assert health("learner", config(), within_s=60) == ["the loop of the learner has not started"]


def test_a_redis_that_does_not_answer_is_reported(config: Callable[..., Config], tmp_path: Path) -> None:
    away = f"unix://{tmp_path}/none.sock"
    with metrics.of_run("mine", "rollout", tmp_path / "mine"), metrics.of_run("mine", "arbiter", tmp_path / "mine"):
        found = health("rollout", config(broker_url=away), within_s=60)
        assert len(found) == 1 and found[0].startswith(f"redis.broker_url {away!r} does not answer: ")
        assert health("arbiter", config(broker_url=away), within_s=60) == []  # it does not use the broker


def test_a_port_that_does_not_answer_is_reported(config: Callable[..., Config]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    made = config()
    made = made.model_copy(update={"metrics": made.metrics.model_copy(update={"port": port})})
    (trouble,) = health("feeder", made, within_s=60)
    assert trouble.startswith(f"127.0.0.1:{port}: does not answer")


def test_a_config_without_a_port_or_without_redis_is_refused(config: Callable[..., Config]) -> None:
    made = config()
    with pytest.raises(ConfigError, match=r"metrics\.port: 0"):
        health("feeder", made.model_copy(update={"metrics": made.metrics.model_copy(update={"port": 0})}), within_s=60)
    with pytest.raises(ConfigError, match=r"redis\.url: not set"):
        health("feeder", made.model_copy(update={"redis": made.redis.model_copy(update={"url": None})}), within_s=60)
