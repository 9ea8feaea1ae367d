"""One role, one process: what `katana feeder | arbiter | learner | rollout | teacher | evaluator CONFIG` runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis

from actors.placing import with_learner_here
from common import metrics, tracing
from common.config import Config, ConfigError
from common.episode import Episode
from common.runfiles.making import open_folder
from common.runfiles.names import REPORT_LOCK, RUN
from common.runfiles.run import RunFolder
from common.teachers import process, section
from common.wire.lease import LeaseLost
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping
from common.wire.planes import create_on, open_planes
from ops.reach.run import wait_for_config, wait_for_key, working_config
from ops.reach.server import Unreachable, facts_of, memory_of, memory_warning, reach, too_small
from ops.run.devices import devices_of, problem_with
from ops.run.ranks import Others, follow_torchrun, others_of_torchrun, rank_of_torchrun, ranks_beside

log = logging.getLogger("katana.roles")
RUN_KEY = "KATANA_RUN_KEY"
WORKERS = ("rollout", "teacher")  # Celery workers: they end only on a signal, and wait for the next run
_DEVICE_OF = {"evaluator": "eval"}  # section of the config by role, where the names differ


def run_role(role: str, config: Config, teacher: str | None = None) -> int:
    """Run a role until its run is over or a signal stops it; returns the exit code. `teacher`: the one of several that
    a teacher worker is for. Raises ConfigError, also if that is not one of the config's."""
    teacher = _teacher_of(config, teacher) if role == "teacher" else ""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {role} %(levelname)s %(message)s")
    if role == "learner" and (rank := rank_of_torchrun()) is not None:
        if rank:
            return follow_torchrun()
        with others_of_torchrun() as others:
            return _run(role, config, others)
    return _run(role, config, None, teacher)


def _teacher_of(config: Config, teacher: str | None) -> str:
    """Raises ConfigError if the config has no such teacher, or several and none is named."""
    if not config.teachers:
        if teacher:
            raise ConfigError(f"--teacher {teacher}: the config has one teacher, in `teacher`; leave --teacher out")
        return ""
    known = ", ".join(config.teachers)
    if not teacher:
        raise ConfigError(f"--teacher is missing: a worker is for one of the teachers; allowed: {known}")
    if teacher not in config.teachers:
        raise ConfigError(f"--teacher {teacher}: the config has no such teacher; allowed: {known}")
    return teacher


def _run(role: str, config: Config, others: Others | None, teacher: str = "") -> int:
    stop = threading.Event()
    if role not in WORKERS:  # Celery has handlers of its own
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    try:
        clients = _connect(role, config, teacher)
    except Unreachable as error:
        if RUN_KEY not in os.environ:
            raise
        log.error("error: %s", error)  # Redis answered when `katana run` started, so the config is right
        return 1
    if role in WORKERS:
        return _run_celery_worker(role, config, process(teacher) if role == "teacher" else role)
    if role == "feeder" and RUN_KEY not in os.environ:  # `katana run` has checked it
        _check_memory(config, clients)
    try:
        config, plane = _join(role, config, clients, stop)
        # These run again even so: they may have died before the last rollouts were booked, the last version evaluated.
        if role not in ("feeder", "evaluator") and plane.state() == "ended":
            log.info("run %s has ended; its feeder reopens it when there are more steps to do", config.name)
            return 0
        begin = _begin(role, config, others)  # it may fork: before any thread begins
        _serve_metrics(config)
        with metrics.of_run(config.name, role, config.run_dir), tracing.of_role(config, role):
            begin(config, plane, stop)
            metrics.last_look(stop)
    except Stopping:
        log.info("stopped")
    except (RunGone, LeaseLost, RedisUnavailable) as error:
        log.error("error: %s", error)
        return 1
    except Exception as error:
        if not _is_disk_full(error):
            raise
        log.error("error: no room left on the disk of %s: free some and start again; nothing is lost", config.run_dir)
        return 1
    # The exit code tells a supervisor whether the run has ended or a signal stopped the role.
    return 130 if stop.is_set() else 0


def _check_memory(config: Config, clients: Sequence[redis.Redis]) -> None:
    """Raises ConfigError if Redis is too small for the run; called before the run is opened."""
    for client, url in zip(clients, config.redis.servers, strict=True):
        limit, where = facts_of(client).get("maxmemory"), memory_of(config, url)
        if limit is None:
            continue
        limit *= len(clients)
        if problem := too_small(config, limit, where):
            raise ConfigError(problem)
        if warning := memory_warning(config, limit, where):
            log.warning("%s", warning)


def _is_disk_full(error: Exception) -> bool:
    """Safetensors raises its own error class, with the error number in the text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def _connect(role: str, config: Config, teacher: str = "") -> list[redis.Redis]:
    """A client of each data server of the run. Raises ConfigError, also if this machine lacks the role's device."""
    with _cuda_left_alone():
        for key, device in devices_of(config):
            if key.startswith(f"{section(teacher) if role == 'teacher' else _DEVICE_OF.get(role, role)}.") and (
                problem := problem_with(device)
            ):
                raise ConfigError(f"{key}: {problem}")
    return reach(config, role)


@contextlib.contextmanager
def _cuda_left_alone() -> Iterator[None]:
    """A look for a GPU does not initialise CUDA: a learner that may fork its ranks could not do so then."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _serve_metrics(config: Config) -> None:
    host = config.metrics.host
    try:
        port = metrics.serve(host, config.metrics.port)
    except OSError as error:
        raise ConfigError(f"metrics.host {host!r}, metrics.port {config.metrics.port}: {error.strerror}") from error
    log.info("metrics on http://%s:%d/metrics", host, port)


def _join(role: str, config: Config, clients: Sequence[redis.Redis], stop: threading.Event) -> tuple[Config, Plane]:
    """The run's config and plane. The feeder opens the run; all other roles wait for it.

    All roles take the run's config from Redis. Only the addresses of Redis and of the metrics come from the role's
    own config file.
    """
    run_key = os.environ.get(RUN_KEY)  # set by `katana run`, which has opened the run
    if run_key is None:
        run_key = _open_run(config, clients) if role == "feeder" else wait_for_key(config, clients[0], stop)
    plane = _plane(config, clients, run_key, stop)
    if role == "feeder" and any(part.state() is None for part in plane.parts):
        log.warning("Redis has lost this run: reopening it; what was in flight is booked as lost")
        create_on(clients, config, run_key)
    config = working_config(wait_for_config(config, plane, stop), run_key, config, own=("metrics",))
    config = with_learner_here(config) if role == "learner" else config
    return config, _plane(config, clients, run_key, stop)


def _plane(config: Config, clients: Sequence[redis.Redis], run_key: str, stop: threading.Event) -> Plane:
    plane = open_planes(config, clients, run_key, stop)
    plane.errors = lambda kind: metrics.redis_errors.labels(kind).inc()
    return plane


def _open_run(config: Config, clients: Sequence[redis.Redis]) -> str:
    """Open a run on a cluster, or resume it from its folder, as `katana run --resume` does. Raises ConfigError."""
    resume = (config.run_dir / RUN).exists()
    run_key = open_folder(config, resume=resume)
    create_on(clients, config, run_key)
    plane = open_planes(config, clients, run_key)
    budget = config.learner.max_generated_tokens
    spent = budget is not None and plane.generated() >= budget
    if plane.steps()[0] < config.learner.max_steps and not spent:
        plane.reopen(config.to_yaml())
    return run_key


def _begin(role: str, config: Config, others: Others | None) -> Callable[[Config, Plane, threading.Event], None]:
    return _START[role] if role != "learner" else partial(_learner, others=ranks_beside(config, others))


def _feeder(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.app import keep_tasks_waiting, make_app, queues_of, remove_waiting_tasks
    from actors.feeder import Feeder
    from ops.run.tracking import Tracking
    from ops.tasks.source import TaskSource

    broker = make_app(config.redis, "feeder")
    source = TaskSource(config)
    source.note_data(config.run_dir)
    for note in source.notes:
        log.warning("data: %s", note)
    source.prepare()
    away, queues = Episode(log), queues_of(config)
    send_tasks = partial(keep_tasks_waiting, broker, plane.run_key, away, queues)
    feeder = Feeder(config, plane, source, stop, send_tasks=send_tasks)
    with Tracking(config, plane.run_key, config.tracking) as tracking:
        feeder.run()
        if plane.state() == "ended":
            remove_waiting_tasks(broker, queues)
            _sum_up(config.run_dir)
            tracking.wait_for_evaluations(stop)


def _arbiter(config: Config, plane: Plane, stop: threading.Event) -> None:
    from actors.arbiter import Arbiter, PolicyBroken

    try:
        Arbiter(config, plane, stop).run()
    except PolicyBroken as error:
        log.error("error: %s", error)
        raise SystemExit(1) from error


def _learner(config: Config, plane: Plane, stop: threading.Event, others: Others | None = None) -> None:
    from common.pretrained import check_pair
    from learner.checkpoint import TornCheckpointError
    from learner.culprits import StepImpossible
    from learner.lora import make_student
    from learner.ranks import RankFailed
    from learner.train import Learner

    try:
        with others.lead(config, stop) if others else contextlib.nullcontext(make_student) as student:
            Learner(config, plane, check_pair(config), stop, student).run()
    except TornCheckpointError as error:
        raise ConfigError(f"{error}; restore a good one, or remove them all to start over") from error
    except (StepImpossible, RankFailed) as error:
        log.error("error: %s", error)
        raise SystemExit(1) from error


def _evaluator(config: Config, plane: Plane, stop: threading.Event) -> None:
    from ops.run.evaluator import follow

    folder = RunFolder(config.run_dir)

    def begun() -> bool:
        """The first step needs every core: the start is what a user waits for."""
        return next(iter(folder.steps()), None) is not None

    follow(config, stop, lambda: plane.state() in ("trained", "ended", None), begun)
    if not stop.is_set():
        _sum_up(config.run_dir)


def _sum_up(folder: Path) -> None:
    """Write summary and report of a run's folder. The feeder does so when the books are closed, the evaluator after the
    last version. Either may be the last, and a lock keeps an older state from overwriting a newer one.

    A folder that cannot be read fails no role: the work is done, and `katana report` shows the same error.
    """
    from ops.report.command import write_report
    from ops.run.summary import write_summary

    with (folder / REPORT_LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            write_summary(folder)
            if RUN_KEY not in os.environ:  # `katana run` writes the report itself, when all its roles have ended
                write_report(folder)
        except ConfigError as error:
            log.error("cannot write summary or report of %s: %s", folder, error)


_START = {"feeder": _feeder, "arbiter": _arbiter, "learner": _learner, "evaluator": _evaluator}


def _set_environment(settings: dict[str, str | None]) -> None:
    """Set the variables that `actors.app` reads, and remove those whose value is None."""
    for name, value in settings.items():
        os.environ.pop(f"KATANA_{name.upper()}", None)
        if value is not None:
            os.environ[f"KATANA_{name.upper()}"] = value


def _run_celery_worker(role: str, config: Config, queue: str) -> int:
    """Run a Celery worker of one queue in this process. SIGTERM ends its worker task, then the worker."""
    urls = " ".join(config.redis.servers)
    _set_environment({"redis_url": urls, "broker_url": config.redis.broker, **config.redis.access(role)})
    _set_environment({"metrics_host": config.metrics.host, "metrics_port": str(config.metrics.port)})
    import torch  # noqa: F401  slow, so not left to the first worker task

    from actors.app import app, exit_code

    celery: Any = app
    celery.worker_main(
        [
            "worker",
            "-Q",
            queue,
            "-n",
            f"{queue}-{os.getpid()}@%h",
            "--loglevel",
            "INFO",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ]
    )
    return exit_code()
