"""Celery: which worker serves which run, for how long. The work itself is in Redis streams.

A worker task (`shift`) loads the model once per process and serves a run's streams. It returns after
`liveness.shift_s`, or when the run ends or the worker is stopped. A lost or doubled message does no harm: the feeder
sends another task when a queue is empty, and a task of an ended run returns at once.

Each role of workers has a queue, of several teachers each its own (`teacher-NAME`).

Settings come from the environment, so that `celery -A actors.app worker -Q rollout` works by itself:

    KATANA_REDIS_URL       data Redis      redis://localhost:6379/0   several: with spaces between them
    KATANA_BROKER_URL      Celery broker   redis://localhost:6379/1
    KATANA_USERNAME        ACL user of both (none: the default user)
    KATANA_PASSWORD_FILE   password of both, first line of the file
    KATANA_CA_FILE         for rediss://: authority that signed the servers' certificates (none: the system's)
    KATANA_CERT_FILE       for rediss://: certificate to show to the servers, and
    KATANA_KEY_FILE        its key
    KATANA_METRICS_HOST    address that metrics are served on   127.0.0.1
    KATANA_METRICS_PORT    their port                           0: any free one

User and password are passed to the connections only: no URL, and so no log line, contains them. Remote control
(`celery inspect`, `celery control`) is off: anyone who reaches the broker could stop workers, and nothing here uses it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import celery.worker.state
import kombu.exceptions
import redis
from celery import Celery
from celery.signals import worker_init, worker_shutting_down
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis

from common import metrics, tracing
from common.config import Config, ConfigError, Redis, parse, redis_settings
from common.episode import Episode
from common.pretrained import ModelError
from common.teachers import called, process
from common.wire.connect import connect, read_password, tls_options
from common.wire.plane import Plane, RedisUnavailable, RunGone, Stopping
from common.wire.planes import check_places, open_planes

log = logging.getLogger("katana.app")
_BROKER_ERRORS = (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError)
STOP = threading.Event()


def settings_from_environment() -> Redis:
    """Address of Redis, and this worker's user there. Raises ConfigError."""
    found = {
        name: os.environ[f"KATANA_{name.upper()}"]
        for name in ("broker_url", "username", "password_file", "ca_file", "cert_file", "key_file")
        if f"KATANA_{name.upper()}" in os.environ
    }
    urls = os.environ.get("KATANA_REDIS_URL", "redis://localhost:6379/0").split(" ")
    where = {"data": urls} if len(urls) > 1 else {"url": urls[0]}
    return redis_settings({"broker_url": "redis://localhost:6379/1", **where, **found}, source="KATANA_…")


def celery_url(url: str) -> str:
    """A Redis URL in kombu's form: kombu writes redis+socket:// for unix:// of redis-py."""
    if not url.startswith("unix://"):
        return url
    path, _, query = url.removeprefix("unix://").partition("?")
    database = dict(item.partition("=")[::2] for item in query.split("&")).get("db", "0")
    return f"redis+socket://{path}?virtual_host={database}"


class _QoS(kombu_redis.QoS):
    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Do nothing. kombu would requeue the message of a dead worker after an hour, but the feeder has sent another
        task long before. kombu's lock for this would also need the right to SET and DEL."""


class _Channel(kombu_redis.Channel):
    QoS = _QoS


class _Transport(kombu_redis.Transport):
    Channel = _Channel


class _Connection(Connection):
    def get_transport_cls(self) -> type[_Transport]:
        return _Transport


def make_app(settings: Redis, role: str) -> Celery:
    """A Celery app that acknowledges early, prefetches nothing, keeps no results and carries ids as JSON.

    Raises ConfigError for a password or certificate file that cannot be read.
    """
    url, access = settings.broker, settings.access(role)
    username, password = access.pop("username"), read_password(access.pop("password_file"))
    app = Celery("katana", broker=celery_url(url))
    # Not as part of the URL: Celery logs the URL with the user in it.
    provider = None if password is None else redis.UsernamePasswordCredentialProvider(username, password)
    app.amqp.Connection = partial(_Connection, credential_provider=provider)
    # Without these options kombu does not verify certificates.
    app.conf.broker_use_ssl = tls_options(url, **access) or None
    app.conf.update(
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_concurrency=1,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=True,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_timeout=1.0,
        worker_enable_remote_control=False,
        broker_transport_options={"socket_keepalive": True, "socket_connect_timeout": 1.0, "socket_timeout": 10.0},
    )
    return app


app = make_app(settings_from_environment(), "")


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_shutdown(**_: Any) -> None:
    STOP.set()


def _worker_name(role: str) -> str:
    return f"{role}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def _join_run(run_key: str) -> tuple[Config, Plane] | None:
    """The run's config and plane; None if the run is unknown to Redis or not open (the task came too late)."""
    settings = settings_from_environment()
    clients = [connect(url, **settings.access("")) for url in settings.servers]
    home = Plane(clients[0], run_key, shards=1, wait_s=60.0, claim_pause_s=8.0, stop=STOP)
    raw = home.patiently(lambda: home.client.get(home.key("config")), "config")
    if not isinstance(raw, bytes) or home.state() != "open":
        return None
    config = parse(raw, source=f"config of {run_key}")
    plane = open_planes(config, clients, run_key, STOP)
    check_places(config, plane)
    plane.errors = lambda kind: metrics.redis_errors.labels(kind).inc()
    return config, plane


@app.task(name="katana.rollout_shift")  # type: ignore[untyped-decorator]
def rollout_shift(run_key: str) -> None:
    """Serve a run's prompts."""
    with _ending_the_worker_on_failure():
        joined = _join_run(run_key)
        if joined is None:
            return
        config, plane = joined
        from actors.rollout import RolloutWorker  # imports torch: only in a process that serves

        worker = RolloutWorker(config, plane, _engines(config).writer, worker=_worker_name("rollout"), stop=STOP)
        with metrics.of_run(config.name, "rollout", config.run_dir), tracing.of_role(config, "rollout"):
            worker.serve(time.monotonic() + config.liveness.shift_s)


@app.task(name="katana.teacher_shift")  # type: ignore[untyped-decorator]
def teacher_shift(run_key: str, teacher: str = "") -> None:
    """Serve the chunks of a run, of several teachers those of one."""
    with _ending_the_worker_on_failure():
        joined = _join_run(run_key)
        if joined is None:
            return
        config, plane = joined
        if teacher not in config.all_teachers:
            log.warning("a task for %s, which is no teacher of the run %s", called(teacher), config.name)
            return
        from actors.teacher import TeacherWorker

        engines = _engines(config)
        worker = TeacherWorker(
            config,
            plane,
            engines.scorer(teacher),
            vocab_size=engines.pair.vocab_size,
            stop_count=len(engines.pair.stop_ids),
            worker=_worker_name("teacher"),
            stop=STOP,
            teacher=teacher,
        )
        with metrics.of_run(config.name, "teacher", config.run_dir, teacher), tracing.of_role(config, "teacher"):
            worker.serve(time.monotonic() + config.liveness.shift_s)


def _engines(config: Config) -> Any:
    from actors.engine.loaded import engines_for

    return engines_for(config)


@contextmanager
def _ending_the_worker_on_failure() -> Iterator[None]:
    """An error that ends a worker task would end the next one too: log it and end the process.

    Exit code 2 for an unusable model or config, 1 otherwise; the supervisor decides whether to start another worker.
    The error is raised again, or Celery would log that the task succeeded.
    """
    try:
        yield
    except (RunGone, RedisUnavailable, Stopping) as error:
        log.warning("worker task ended: %s", error)
    except Exception as error:
        celery.worker.state.should_stop = 2 if isinstance(error, ModelError | ConfigError) else 1
        log.error("error: %s", error or type(error).__name__)
        raise


def exit_code() -> int:
    """Exit code for a worker process after `worker_main` returns, which does not return it."""
    asked = celery.worker.state.should_stop
    return int(asked) if asked else 0


@worker_init.connect  # type: ignore[untyped-decorator]
def serve_metrics(**_: Any) -> None:
    """Serve this process's metrics at the address in the environment (KATANA_METRICS_HOST, _PORT; 0: any free port)."""
    host = os.environ.get("KATANA_METRICS_HOST", "127.0.0.1")
    port = metrics.serve(host, int(os.environ.get("KATANA_METRICS_PORT", "0")))
    log.info("metrics on http://%s:%d/metrics", host, port)


def queues_of(config: Config) -> dict[str, tuple[str, list[str]]]:
    """The queues of a run: for each its task, and what this is given besides the run's key."""
    teachers = {process(name): ("teacher", [name] if name else []) for name in config.all_teachers}
    return {"rollout": ("rollout", []), **teachers}


def keep_tasks_waiting(
    sender: Celery, run_key: str, away: Episode, queues: Mapping[str, tuple[str, list[str]]]
) -> None:
    """Keep one waiting task in every queue, so that any idle worker finds one, and none finds two. `queues`: see
    `queues_of`.

    If the broker does not answer or is full, this is logged once (by `away`) and tried again at the next call: workers
    that already serve the run need no task.
    """
    try:
        with sender.connection_for_write() as connection:
            for queue, (role, more) in queues.items():
                if _waiting(connection, queue) == 0:
                    sender.send_task(
                        f"katana.{role}_shift",
                        args=[run_key, *more],
                        queue=queue,
                        connection=connection,
                        retry=False,
                    )
    except _BROKER_ERRORS as error:
        away.seen(f"the broker does not answer or is full, no worker task was sent: {error}")
    else:
        away.not_seen("the broker accepts worker tasks again")


def remove_waiting_tasks(sender: Celery, queues: Iterable[str]) -> None:
    """Remove the waiting tasks: the run has ended."""
    try:
        with sender.connection_for_write() as connection:
            for queue in queues:
                connection.default_channel.queue_purge(queue)
    except _BROKER_ERRORS as error:
        log.warning("the broker does not answer, waiting tasks stay in it and will return at once: %s", error)


def _waiting(connection: Any, queue: str) -> int:
    client = connection.default_channel.client
    return int(client.llen(queue))
