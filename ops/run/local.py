"""`katana run`: runs every role on this machine, with an embedded Redis unless the config names one."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.placing import DEVICE
from common.config import Config, ConfigError, check_resume
from common.files import write_json
from common.runfiles.making import lock, open_folder
from common.runfiles.names import BUSY, CONFIG, LOGS, REDIS, RUN, WALL
from common.runfiles.records import Wall
from common.runfiles.run import RunFolder
from common.teachers import process
from common.wire.plane import Plane, RedisUnavailable
from common.wire.planes import check_places, create_on, open_planes
from ops.reach.children import Child, end, katana, start
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import with_redis
from ops.reach.server import reach
from ops.run.devices import gpus_here, spread, uses_auto
from ops.run.failures import MOST, Failures, mark_of
from ops.run.nursery import Nursery, NurseryFailed
from ops.run.progress import RunProgress, describe
from ops.run.roles import RUN_KEY, WORKERS
from ops.run.summary import write_summary

log = logging.getLogger("katana.local")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 15.0  # for children to drain after a signal; Redis stops after that, within the promised 20 s
EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class ChildFailed(RuntimeError):
    """A role failed and is not restarted. `code` is the exit code of the command."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class _Child:
    role: str
    name: str
    threads: int
    words: tuple[str, ...] = ()  # of its command, after the config
    process: Child | None = None
    failures: Failures = field(default_factory=Failures)
    log_from: int = 0  # offset in its log at which the output of the current process begins
    done: bool = False


class LocalRun:
    """Starts the roles, restarts those that die, ends them in order."""

    def __init__(self, config: Config, run_key: str, nursery: Nursery | None = None) -> None:
        self._config, self._run_key, self._nursery = config, run_key, nursery
        self._folder = config.run_dir
        self._redis: EmbeddedRedis | None = None
        self._plane: Plane
        self._children = _children(config)
        self._devices = spread(config, gpus_here() if uses_auto(config) else 0)
        self._interrupts = 0
        self._wake = threading.Event()

    def run(self) -> int:
        """Run to the end; returns the exit code."""
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        held = lock(self._folder)
        began = time.time()
        try:
            return self._run(began)
        finally:
            # The order matters: 1. the children, which need Redis to release their work; 2. Redis; 3. the lock.
            self._stop_children()
            if self._redis is not None:
                self._redis.stop()
            held.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self, began: float) -> int:
        plane = self._plane = self._start_redis()
        progress = RunProgress(self._config, plane)
        for child in self._children:
            self._start(child)
        try:
            with progress:
                while not self._interrupts and not self._over():
                    self._watch()
                    progress.update()
                    self._wake.wait(0.25)
        except (ChildFailed, NurseryFailed) as failure:
            self._note_wall(began)
            print(f"katana: {failure}", file=sys.stderr)
            if failure.code != EXIT_BAD_INPUT:
                print(self._how_to_resume(), file=sys.stderr)
            return failure.code
        self._note_wall(began)
        if self._interrupts:
            print(
                "stopping: closing open chunks, writing a checkpoint (Ctrl-C again stops at once)",
                file=sys.stderr,
            )
            self._stop_children()
            print(f"stopped. {self._how_to_resume()}", file=sys.stderr)
            return EXIT_INTERRUPTED
        self._stop_children()
        write_json(self._folder / BUSY, progress.busy_shares())
        from ops.report.command import write_report  # matplotlib: not while a run starts

        summary = write_summary(self._folder)
        write_report(self._folder)
        print(describe(summary, self._config))
        return EXIT_OK

    def _start_redis(self) -> Plane:
        """Start the embedded Redis unless the config names one, and register the run in it."""
        if self._config.redis.url is None:
            self._redis = EmbeddedRedis(self._folder / REDIS, maxmemory_mb=self._config.redis.maxmemory_mb)
            self._redis.start()
            self._config = with_redis(self._config, self._redis.url, self._redis.broker_url)
        clients = reach(self._config)
        create_on(clients, self._config, self._run_key)
        plane = open_planes(self._config, clients, self._run_key)
        # The workers read the config from Redis, so changes by --resume are stored there. A finished run is reopened
        # if it has more steps to do now.
        plane.reopen(self._config.to_yaml())
        return plane

    # --- children ----------------------------------------------------------------------------------------------

    def _start(self, child: _Child) -> None:
        config_file = self._folder / CONFIG
        overrides = [f"redis.url={self._config.redis.url}"]
        if self._config.redis.broker_url:
            overrides.append(f"redis.broker_url={self._config.redis.broker_url}")
        sets = [word for item in [*overrides, "metrics.port=0"] for word in ("--set", item)]
        environment = {
            "OMP_NUM_THREADS": str(child.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            RUN_KEY: self._run_key,
            DEVICE: self._devices.get(child.name, "cpu"),
        }
        log_file = self._log_of(child)
        log_file.parent.mkdir(exist_ok=True)
        child.log_from = log_file.stat().st_size if log_file.exists() else 0
        words = [child.role, str(config_file), *child.words, *sets]
        if self._nursery is None:
            child.process = start(katana(*words), log_file, environment)
        else:
            child.process = self._nursery.fork(words, log_file, environment, child.threads)

    def _log_of(self, child: _Child) -> Path:
        return self._folder / LOGS / f"{child.name}.log"

    def _watch(self) -> None:
        """Restart children that died. Raises ChildFailed for a failure that a restart does not fix."""
        if self._redis is not None and not self._redis.running():
            log.warning("redis-server ended; restarting it with its data")
            self._redis.start()
        if self._nursery is not None:
            self._nursery.attend()
        for child in self._children:
            if child.done or child.process is None or (code := child.process.poll()) is None:
                continue
            if code == 0 and child.role not in WORKERS:
                child.done = True
                continue
            error = self._last_error(child)
            if code == EXIT_BAD_INPUT:  # a model, device or setting: a restart does not help
                raise ChildFailed(f"{child.name} failed: {error}", EXIT_BAD_INPUT)
            if child.failures.one_more(mark_of(child.role, self._plane, self._folder)):
                text = f"{child.name} failed {MOST + 1} times in a row without progress: {error}"
                raise ChildFailed(text, EXIT_FAILED)
            # A process that was killed or stopped has logged no error.
            reason = f" ({error})" if code > 0 and code != EXIT_INTERRUPTED else ""
            log.warning("%s exited with %d; restarted%s", child.name, code, reason)
            self._start(child)

    def _last_error(self, child: _Child) -> str:
        path = self._log_of(child)
        with path.open("rb") as file:
            file.seek(child.log_from)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line]
        return f"{(errors or lines or ['no output'])[-1].strip()[-500:]} (log: {path})"

    def _how_to_resume(self) -> str:
        return f"Continue with: katana run {self._folder / CONFIG} --resume"

    def _over(self) -> bool:
        """Learner, feeder, arbiter and evaluator end by themselves; the workers wait for the next run."""
        return all(child.done for child in self._children if child.role not in WORKERS)

    def _stop_children(self) -> None:
        if self._nursery is not None:
            self._nursery.close()
        running = [child.process for child in self._children if child.process]
        end(running, _GRACE_S, at_once=lambda: self._interrupts > 1)

    def _on_signal(self, *_: Any) -> None:
        self._interrupts += 1
        self._wake.set()

    def _note_wall(self, began: float) -> None:
        before = RunFolder(self._folder).wall_s or 0.0
        write_json(self._folder / WALL, Wall(before + time.time() - began).to_json())


def _children(config: Config) -> list[_Child]:
    """The learner starts first: all others wait for the weights that it publishes."""
    children = [
        _Child("learner", "learner", config.learner.threads),
        _Child("feeder", "feeder", 1),
        _Child("arbiter", "arbiter", 1),
    ]
    children += [_Child("rollout", f"rollout-{n}", config.rollout.threads) for n in range(config.rollout.workers)]
    for teacher, settings in config.all_teachers.items():
        own = ("--teacher", teacher) if teacher else ()
        names = [f"{process(teacher)}-{n}" for n in range(settings.workers)]
        children += [_Child("teacher", name, settings.threads, own) for name in names]
    if config.eval.every_steps:
        children.append(_Child("evaluator", "evaluator", config.eval.threads))
    return children


def roles_of(config: Config) -> list[str]:
    """The role of every process of a run on one machine."""
    return [child.role for child in _children(config)]


def run_locally(config: Config, nursery: Nursery | None, *, resume: bool, fresh: bool) -> int:
    """`katana run`; returns the exit code. Raises ConfigError and ModelError before any role is started.

    `nursery`: what the roles are forked from; without one each is a process that imports for itself.
    """
    from ops.run.check import check

    found = check(config)
    for problem in [*found.problems, *found.unchecked]:
        raise ConfigError(problem)
    if config.redis.url is not None:  # refused before anything is written
        clients = reach(config)
        if resume and (config.run_dir / RUN).is_file():
            known = RunFolder(config.run_dir)
            check_resume(known.config, config)
            check_places(config, open_planes(config, clients, known.run_key))
    print("\n".join(found.lines), flush=True)
    run_key = open_folder(config, resume=resume, fresh=fresh)
    try:
        return LocalRun(config, run_key, nursery).run()
    except (RuntimeError, RedisUnavailable) as error:
        print(f"katana: {error}", file=sys.stderr)
        return EXIT_FAILED
