"""The one way to a run from outside, for who looks on, who acts, and who joins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import Run, make_config

from common.config import Config, ConfigError
from common.files import write_json, write_text
from common.wire.plane import create_run
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import Away, Outlook, find_key, opened, wait_for_key
from ops.run import roles

ELSEWHERE = Path("elsewhere.yaml")
Start = Callable[..., Run]


def begun(start: Start, server: EmbeddedRedis, name: str) -> Run:
    """A run with four shards, and a folder that says so."""
    run = start(server, name=name, redis={"url": server.url, "broker_url": server.broker_url, "shards": 4})
    run.config.run_dir.mkdir(exist_ok=True)
    write_text(run.config.run_dir / "config.yaml", run.config.to_yaml())
    write_json(run.config.run_dir / "run.json", {"run_key": run.plane.run_key})
    return run


def other(run: Run, **changes: object) -> Config:
    """The run's config as another host has it: another number of shards, other steps."""
    redis = {"url": run.config.redis.url, "broker_url": run.config.redis.broker_url, "shards": 2}
    return make_config(Path(run.config.runs_dir), name=run.config.name, redis=redis, **changes)


def test_all_come_to_the_same_run_by_the_config_that_it_has(own_redis: EmbeddedRedis, start: Start) -> None:
    run = begun(start, own_redis, "reached")
    given, stop = other(run, learner={"max_steps": 3}), threading.Event()
    outlook = Outlook(given, ELSEWHERE)
    try:
        seen = outlook.look()
        assert outlook.look() is seen
    finally:
        outlook.close()
    with opened(given, ELSEWHERE) as acted_on:
        pass
    joined = roles._join("arbiter", given, [run.client], stop)
    for config, plane in ((seen.config, seen.plane), (acted_on.config, acted_on.plane), joined):
        assert plane.run_key == run.plane.run_key
        assert plane.shards == config.redis.shards == 4
        assert config.learner.max_steps == run.config.learner.max_steps
        assert config.redis.url == given.redis.url


def test_a_folder_stands_for_its_run_and_a_name_for_the_one_that_has_it_now(
    own_redis: EmbeddedRedis, start: Start
) -> None:
    run = begun(start, own_redis, "twice")
    create_run(run.client, run.config, "twice-later")
    own = run.config.run_dir / "config.yaml"
    assert find_key(run.config, own, run.client) == run.plane.run_key
    assert find_key(run.config, ELSEWHERE, run.client) == "twice-later"
    outlook = Outlook(run.config, own)
    assert outlook.look().run_key == run.plane.run_key
    (run.config.run_dir / "run.json").unlink()
    assert outlook.look().run_key == "twice-later"  # to look at what has the name does no harm
    outlook.close()
    with pytest.raises(ConfigError, match=r"run\.json"), opened(run.config, own):
        pass


def test_what_is_not_there_is_told_and_waited_for(own_redis: EmbeddedRedis, start: Start) -> None:
    given = other(begun(start, own_redis, "known")).model_copy(update={"name": "unknown"})
    outlook = Outlook(given, ELSEWHERE)
    with pytest.raises(Away, match="no run named 'unknown'"):
        outlook.look()
    with pytest.raises(ConfigError, match="no run named 'unknown'"), opened(given, ELSEWHERE):
        pass
    client = begun(start, own_redis, "known").client
    timer = threading.Timer(0.3, create_run, (client, given, "unknown-1"))
    timer.start()
    assert wait_for_key(given, client, threading.Event()) == "unknown-1"
    timer.join()
    assert outlook.look().run_key == "unknown-1"
    outlook.close()
