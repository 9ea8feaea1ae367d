"""One role, one process: what `katana feeder | arbiter | learner | rollout | teacher | evaluator CONFIG` runs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import redis

from common import metrics
from common.config import Config, ConfigError
from common.episode import Episode
from common.runfiles.run import open_folder
from common.wire.lease import LeaseLost
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping, create_run, open_plane
from ops.reach.run import wait_for_config, wait_for_key, working_config
from ops.reach.server import Unreachable, facts_of, memory_warning, reach, too_small
from ops.run.devices import devices_of, problem_with

log = logging.getLogger("katana.roles")
RUN_KEY = "KATANA_RUN_KEY"
WORKERS = ("rollout", "teacher")  # Celery workers: they end only on a signal, and wait for the next run
_DEVICE_OF = {"evaluator": "eval"}  # section of the config by role, where the names differ


def run_role(role: str, config: Config) -> int:
    """Run a role until its run is over or a signal stops it; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {role} %(levelname)s %(message)s")
    stop = threading.Event()
    if role not in WORKERS:  # Celery has handlers of its own
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    try:
        client = _connect(role, config)
    except Unreachable as error:
        if RUN_KEY not in os.environ:
            raise
        log.error("error: %s", error)  # Redis answered when `katana run` started, so the config is right
        return 1
    if role in WORKERS:
        return _run_celery_worker(role, config)
    if role == "feeder" and RUN_KEY not in os.environ:  # `katana run` has checked it
        _check_memory(config, client)
    try:
        config, plane = _join(role, config, client, stop)
        # The feeder runs again even so: it may have died before it booked the last rollouts.
        if role != "feeder" and plane.state() == "ended":
            log.info("run %s has ended; its feeder reopens it when there are more steps to do", config.name)
            return 0
        _serve_metrics(config)
        with metrics.of_run(config.name, role, config.run_dir):
            _START[role](config, plane, stop)
            metrics.last_look(stop)
    except Stopping:
        log.info("stopped")
    except (RunGone, LeaseLost, RedisUnavailable) as error:
        log.error("error: %s", error)
        return 1
    except Exception as error:
        if not _is_disk_full(error):
            raise
        log.error("error: no space left on the disk of %s: free some and start again; nothing is lost", config.run_dir)
        return 1
    # The exit code tells a supervisor whether the run has ended or a signal stopped the role.
    return 130 if stop.is_set() else 0


def _check_memory(config: Config, client: redis.Redis) -> None:
    """Raises ConfigError if Redis is too small for the run; called before the run is opened."""
    limit, where = facts_of(client).get("maxmemory"), f"maxmemory of {config.redis.url}"
    if limit is None:
        return
    if problem := too_small(config, limit, where):
        raise ConfigError(problem)
    if warning := memory_warning(config, limit, where):
        log.warning("%s", warning)


def _is_disk_full(error: Exception) -> bool:
    """Safetensors raises its own error class, with the error number in the text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def _connect(role: str, config: Config) -> redis.Redis:
    """A client of the run's Redis. Raises ConfigError, also if this machine lacks the role's device."""
    for key, device in devices_of(config):
        if key.startswith(f"{_DEVICE_OF.get(role, role)}.") and (problem := problem_with(device)):
            raise ConfigError(f"{key}: {problem}")
    return reach(config, role)


def _serve_metrics(config: Config) -> None:
    host = config.metrics.host
    try:
        port = metrics.serve(host, config.metrics.port)
    except OSError as error:
        raise ConfigError(f"metrics.host {host!r}, metrics.port {config.metrics.port}: {error.strerror}") from error
    log.info("metrics on http://%s:%d/metrics", host, port)


def _join(role: str, config: Config, client: redis.Redis, stop: threading.Event) -> tuple[Config, Plane]:
    """The run's config and plane. The feeder opens the run; all other roles wait for it.

    All roles take the run's config from Redis. Only the addresses of Redis and of the metrics come from the role's
    own config file.
    """
    run_key = os.environ.get(RUN_KEY)  # set by `katana run`, which has opened the run
    if run_key is None:
        run_key = _open_run(config, client) if role == "feeder" else wait_for_key(config, client, stop)
    plane = _plane(config, client, run_key, stop)
    if role == "feeder" and plane.state() is None:
        log.warning("Redis has lost this run: reopening it; what was in flight is booked as lost")
        create_run(client, config, run_key)
    config = working_config(wait_for_config(config, plane, stop), run_key, config, own=("metrics",))
    return config, _plane(config, client, run_key, stop)


def _plane(config: Config, client: redis.Redis, run_key: str, stop: threading.Event) -> Plane:
    plane = open_plane(config, client, run_key, stop)
    plane.errors = lambda kind: metrics.redis_errors.labels(kind).inc()
    return plane


def _open_run(config: Config, client: redis.Redis) -> str:
    """Open a run on a cluster, or resume it from its folder, as `katana run --resume` does. Raises ConfigError."""
    resume = (config.run_dir / "run.json").exists()
    run_key = open_folder(config, resume=resume)
    create_run(client, config, run_key)
    plane = open_plane(config, client, run_key)
    budget = config.learner.max_generated_tokens
    spent = budget is not None and plane.generated() >= budget
    if plane.steps()[0] < config.learner.max_steps and not spent:
        plane.reopen(config.to_yaml())
    return run_key


def _feeder(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.app import keep_tasks_waiting, make_app, remove_waiting_tasks
    from actors.feeder import Feeder
    from ops.run.tracking import Tracking
    from ops.tasks.source import TaskSource

    broker = make_app(config.redis, "feeder")
    source = TaskSource(config)
    source.note_data(config.run_dir)
    for note in source.notes:
        log.warning("data: %s", note)
    source.prepare()
    away = Episode(log)
    feeder = Feeder(config, plane, source, stop, open_shifts=lambda: keep_tasks_waiting(broker, plane.run_key, away))
    with Tracking(config, plane.run_key, config.tracking) as tracking:
        feeder.run()
        if plane.state() == "ended":
            remove_waiting_tasks(broker)
            _sum_up(config.run_dir)
            tracking.wait_for_evaluations(stop)


def _arbiter(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.arbiter import Arbiter, PolicyBroken

    try:
        Arbiter(config, plane, stop).run()
    except PolicyBroken as error:
        log.error("error: %s", error)
        raise SystemExit(1) from error


def _learner(config: Config, plane: Plane, stop: threading.Event) -> None:
    from common.pretrained import check_pair
    from learner.checkpoint import TornCheckpointError
    from learner.culprits import StepImpossible
    from learner.train import Learner

    try:
        Learner(config, plane, check_pair(config), stop).run()
    except TornCheckpointError as error:
        raise ConfigError(f"{error}; restore a good one, or remove them all to start over") from error
    except StepImpossible as error:
        log.error("error: %s", error)
        raise SystemExit(1) from error


def _evaluator(config: Config, plane: Plane, stop: threading.Event) -> None:
    from ops.run.evaluator import follow

    follow(config, stop, lambda: plane.state() in ("trained", "ended", None))
    if not stop.is_set():
        _sum_up(config.run_dir)


def _sum_up(folder: Path) -> None:
    """Write summary and report of a run's folder. The feeder does so when the books are closed, the evaluator after the
    last version. Either may be the last, and a lock keeps an older state from overwriting a newer one.

    A folder that cannot be read fails no role: the work is done, and `katana report` shows the same error.
    """
    from ops.report.command import write_report
    from ops.run.summary import write_summary

    with (folder / ".report.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            write_summary(folder)
            if RUN_KEY not in os.environ:  # `katana run` writes the report itself, when all its roles have ended
                write_report(folder)
        except (ValueError, KeyError, TypeError) as error:  # of the report a ConfigError, of the summary any of them
            log.error("no summary or no report of %s: %s: %s", folder, type(error).__name__, error)


_START = {"feeder": _feeder, "arbiter": _arbiter, "learner": _learner, "evaluator": _evaluator}


def _set_environment(settings: dict[str, str | None]) -> None:
    """Set the variables that `actors.app` reads, and remove those whose value is None."""
    for name, value in settings.items():
        os.environ.pop(f"KATANA_{name.upper()}", None)
        if value is not None:
            os.environ[f"KATANA_{name.upper()}"] = value


def _run_celery_worker(role: str, config: Config) -> int:
    """Run a Celery worker of one queue in this process. SIGTERM ends its worker task, then the worker."""
    _set_environment({"redis_url": config.redis.url, "broker_url": config.redis.broker, **config.redis.access(role)})
    _set_environment({"metrics_host": config.metrics.host, "metrics_port": str(config.metrics.port)})
    import torch  # noqa: F401  slow, so not left to the first worker task

    from actors.app import app, exit_code

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
    return exit_code()
