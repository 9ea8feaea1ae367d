"""One role, one process: what `katana feeder | arbiter | learner | rollout | teacher | evaluator CONFIG` runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import redis

from common import metrics
from common.config import Config, ConfigError, parse
from common.streams import (
    LeaseLost,
    Plane,
    RedisUnavailable,
    RunGone,
    Stopping,
    connect,
    create_run,
    current_run,
    open_plane,
)
from ops.rundir import open_folder

log = logging.getLogger("katana.roles")
RUN_KEY = "KATANA_RUN_KEY"


def run_role(role: str, config: Config) -> int:
    """Run a role until its run is over or a signal stops it; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {role} %(levelname)s %(message)s")
    if role in ("rollout", "teacher"):
        return _run_celery_worker(role, config)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    client = reach(config)
    try:
        config, plane = _join(role, config, client, stop)
        if plane.state() == "ended":
            log.info("the run %s is over; its feeder opens it again when there are more steps to do", config.name)
            return 0
        _serve_metrics(config)
        _START[role](config, plane, stop)
    except Stopping:
        log.info("stopped")
    except (RunGone, LeaseLost, RedisUnavailable) as error:
        log.error("error: %s", error)
        return 1
    # Whoever watches a role must tell "the run is over" from "told to stop".
    return 130 if stop.is_set() else 0


def _serve_metrics(config: Config) -> None:
    host = config.metrics.host
    try:
        port = metrics.serve(host, config.metrics.port)
    except OSError as error:
        raise ConfigError(f"metrics.host {host!r}, metrics.port {config.metrics.port}: {error.strerror}") from error
    log.info("metrics on http://%s:%d/metrics", host, port)


def reach(config: Config) -> redis.Redis:
    """A client of the config's Redis. Raises ConfigError when there is none, or when it does not answer."""
    if config.redis.url is None:
        raise ConfigError("redis.url: not set; a single role needs the Redis of its run (katana run brings its own)")
    try:
        client = connect(config.redis.url, password_file=config.redis.password_file)
    except (ValueError, OSError, IndexError) as error:
        raise ConfigError(
            f"redis.url {config.redis.url!r}, password_file {config.redis.password_file!r}: {error}"
        ) from error
    deadline = time.monotonic() + min(10.0, config.liveness.redis_wait_s)
    while True:
        try:
            client.ping()
            return client
        except (redis.exceptions.RedisError, OSError) as error:
            if time.monotonic() >= deadline or isinstance(error, redis.exceptions.AuthenticationError):
                raise ConfigError(f"redis.url {config.redis.url!r}: Redis does not answer ({error})") from error
            time.sleep(0.2)


def _join(role: str, config: Config, client: redis.Redis, stop: threading.Event) -> tuple[Config, Plane]:
    """The run's config and plane: the feeder opens the run, everyone else waits for it.

    Roles take the run's config from Redis, so that all work by the same; only where Redis and metrics are is each
    one's own affair.
    """
    run_key = os.environ.get(RUN_KEY)  # a child of `katana run`, which has opened the run
    if run_key is None:
        run_key = _open_run(config, client) if role == "feeder" else _wait_for_run(config, client, stop)
    plane = open_plane(config, client, run_key, stop)
    plane.errors = lambda kind: metrics.redis_errors.labels(kind).inc()
    if role == "feeder" and plane.state() is None:
        log.warning("Redis has lost this run: it is opened again, what was in flight is booked as lost")
        create_run(client, config, run_key)
    raw = client.get(plane.key("config"))
    if not isinstance(raw, bytes):
        raise RunGone(f"Redis does not know the run {run_key!r} any more: its feeder opens it again")
    shared = parse(raw, source=f"config of {run_key}")
    return shared.model_copy(update={"redis": config.redis, "metrics": config.metrics}), plane


def _open_run(config: Config, client: redis.Redis) -> str:
    """Open a run on a cluster, or go on in its folder, as `katana run` and `--resume` do. Raises ConfigError."""
    resume = (config.run_dir / "run.json").exists()
    run_key = open_folder(config, resume=resume)
    create_run(client, config, run_key)
    plane = open_plane(config, client, run_key)
    client.set(plane.key("config"), config.to_yaml())
    if int(plane.policy().get("step", "0")) < config.learner.max_steps:
        client.set(plane.key("run"), "open")
    return run_key


def _wait_for_run(config: Config, client: redis.Redis, stop: threading.Event) -> str:
    deadline = time.monotonic() + config.liveness.redis_wait_s
    while (run_key := current_run(client, config.name)) is None:
        if time.monotonic() > deadline:
            raise RunGone(f"Redis knows no run named {config.name!r}: start its feeder")
        if stop.wait(0.2):
            raise Stopping
    return run_key


def _feeder(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.app import close_shifts, keep_shifts_open, make_app, with_password
    from actors.feeder import Feeder
    from ops.report import write_report
    from ops.source import TaskSource
    from ops.summary import write_summary

    broker = make_app(with_password(broker_url(config), config.redis.password_file))
    feeder = Feeder(
        config, plane, TaskSource(config), stop, open_shifts=lambda: keep_shifts_open(broker, plane.run_key)
    )
    feeder.run()
    if plane.state() == "ended":
        close_shifts(broker)
        write_summary(config.run_dir)
        if RUN_KEY not in os.environ:  # `katana run` draws when the last evaluation is done
            write_report(config.run_dir)


def _arbiter(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.arbiter import Arbiter

    Arbiter(config, plane, stop).run()


def _learner(config: Config, plane: Plane, stop: threading.Event) -> None:
    from common.pretrained import check_pair
    from learner.checkpoint import TornCheckpointError
    from learner.train import Learner

    try:
        Learner(config, plane, check_pair(config), stop).run()
    except TornCheckpointError as error:
        raise ConfigError(f"{error}; put a good one back, or remove them all to begin anew") from error


def _evaluator(config: Config, plane: Plane, stop: threading.Event) -> None:
    from ops.evaluate import follow
    from ops.summary import write_summary

    follow(config, stop, lambda: plane.state() in ("trained", "ended", None))
    if not stop.is_set():
        write_summary(config.run_dir)


_START = {"feeder": _feeder, "arbiter": _arbiter, "learner": _learner, "evaluator": _evaluator}


def broker_url(config: Config) -> str:
    """`redis.broker_url`, or database 1 of `redis.url`."""
    if config.redis.broker_url is not None:
        return config.redis.broker_url
    url = config.redis.url or ""
    if url.startswith("unix://"):
        return url.partition("?")[0] + "?db=1"
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    return f"{scheme}://{host}/1"


def _run_celery_worker(role: str, config: Config) -> int:
    """A Celery worker of one queue, in this process; SIGTERM lets it finish its shift."""
    reach(config)
    os.environ["KATANA_REDIS_URL"] = str(config.redis.url)
    os.environ["KATANA_BROKER_URL"] = broker_url(config)
    os.environ["KATANA_METRICS_HOST"] = config.metrics.host
    os.environ["KATANA_METRICS_PORT"] = str(config.metrics.port)
    if config.redis.password_file:
        os.environ["KATANA_PASSWORD_FILE"] = config.redis.password_file
    import torch  # noqa: F401  here, not in the first shift: a worker that is ready is ready

    from actors.app import app

    celery: Any = app
    celery.worker_main(
        [
            "worker",
            "-Q",
            role,
            "-n",
            f"{role}-{os.getpid()}@%h",
            "--loglevel",
            "INFO",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
    return 0
