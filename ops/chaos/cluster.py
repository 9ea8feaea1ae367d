"""The run that faults are injected into: `katana run` as its users start it, on a Redis that the harness owns.

The run does not know about the harness. Its Redis socket is the harness's proxy, and processes are found by their
command lines, as an operator would find them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from common import own_packages
from common.config import Config
from common.runfiles.names import CONFIG
from common.runfiles.records import Step
from common.runfiles.run import RunFolder
from common.wire.plane import Plane, open_plane
from ops.chaos.proxy import RedisProxy
from ops.reach.children import end, katana, start
from ops.reach.embedded import EmbeddedRedis
from ops.reach.left_over import SOCKETS, harness_folder
from ops.reach.run import with_redis

ROLES = ("rollout", "teacher", "arbiter", "learner", "feeder")
WORKERS = ("rollout", "teacher")
_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
_SERVED_S = 60.0  # how long a fault waits for Redis to be started
_RESTARTS_A_MINUTE = 3  # `katana run` gives a child up that ends more than five times within a minute


class RunEnded(RuntimeError):
    """`katana run` ended while faults were injected. The message has its last log lines."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Progress of a run's work; a value that has grown shows that a process has done something."""

    chunks: bytes  # the last notice that a rollout worker gave a teacher
    scores: bytes  # the last notice that a teacher gave the arbiter
    verdicts: bytes  # the last notice that the arbiter gave the learner
    trained: float  # when the last step was taken; 0 for one by a clock that ran ahead
    admitted: int


class Cluster:
    """`katana run` under test. Use as a context manager; leaving it ends everything that it started."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.run_dir
        self.harness_folder = harness_folder(config.run_dir)
        self.redis = EmbeddedRedis(self.harness_folder, maxmemory_mb=config.redis.maxmemory_mb)
        self.clocks, self.poison = self.harness_folder / "clocks", self.harness_folder / "poison"
        self.busy_redis = threading.Lock()  # held by a fault that takes Redis away
        self.closing = threading.Event()  # everything is being ended: no fault may begin or start anything
        self._wanted: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()  # faults that wait for Redis to be started
        self._sockets = Path(tempfile.gettempdir()) / f"{SOCKETS}{secrets.token_hex(8)}"  # made on entering
        self.proxy = RedisProxy(
            self._sockets / "redis.sock",
            Path(self.redis.url.removeprefix("unix://").partition("?")[0]),
            random.Random(config.seed),
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._extra: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()
        self._plane: Plane | None = None

    # --- start and end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            shutil.rmtree(self.harness_folder, ignore_errors=True)
            self.clocks.mkdir(parents=True)
            self.poison.mkdir()
            self._sockets.mkdir(mode=0o700)
            self.redis.start()
            self.proxy.start()
            self.launch("--fresh")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for pid in [*self._extra, *(pid for role in ROLES for pid in self.pids(role))]:
            _signal(pid, signal.SIGCONT)  # a stopped process receives nothing else
        end([*self._extra.values(), *([self.process] if self.process else [])], 25)
        for role in ROLES:
            for pid in self.pids(role):
                _signal(pid, signal.SIGKILL)
        if self._plane is not None:
            self._plane.client.close()
        self.proxy.close()
        if self.redis.running():
            _signal(self.redis.pid, signal.SIGCONT)
        self.redis.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def restart_redis(self) -> None:
        """Start Redis after a fault has killed it. Raises RunEnded once everything is being ended.

        The main thread does it (`serve`): a child that a short-lived thread starts does not end with the harness when
        that is killed, see `end_with_parent`.
        """
        self.check_open()
        if threading.current_thread() is threading.main_thread():
            self.redis.start()
            return
        started: Future[None] = Future()
        self._wanted.put(started)
        deadline = time.monotonic() + _SERVED_S
        while not started.done():
            self.check_open()
            if time.monotonic() > deadline:
                raise RunEnded(f"Redis was not started again within {_SERVED_S:.0f} s")
            wait([started], 0.1)
        started.result()

    def serve(self, until: Callable[[], bool]) -> None:
        """For the main thread while faults are under way: start Redis when they ask for it, until `until` is true."""
        try:
            while not until():
                with contextlib.suppress(queue.Empty):
                    self._start_for(self._wanted.get(timeout=0.05))
        except BaseException:  # Ctrl-C: nothing serves any more, and a fault's thread may still be waiting
            self.closing.set()
            raise

    def _start_for(self, started: Future[None]) -> None:
        try:
            self.redis.start()
        except (RuntimeError, OSError) as error:
            started.set_exception(error)
        else:
            started.set_result(None)

    def check_open(self) -> None:
        """Raises RunEnded once everything is being ended."""
        if self.closing.is_set():
            raise RunEnded("the harness is being ended")

    def launch(self, *flags: str, overrides: dict[str, Any] | None = None) -> None:
        """Start `katana run` (or, with `--resume`, go on). Its output goes to chaos.log beside the run's folder."""
        source = self.folder / CONFIG if "--resume" in flags else self.harness_folder / CONFIG
        if "--resume" not in flags:
            socket = self._sockets / "redis.sock"
            config = with_redis(self.config, f"unix://{socket}?db=0", f"unix://{socket}?db=1")
            source.write_text(config.to_yaml())
        sets = [part for key, value in (overrides or {}).items() for part in ("--set", f"{key}={json.dumps(value)}")]
        self.process = start(katana("run", str(source), *sets, *flags), self.log_path, self._environment())

    def _environment(self) -> dict[str, str]:
        shim = str(Path(__file__).parent / "shim")
        ours = own_packages.environment()
        path = os.pathsep.join([shim, *filter(None, [ours["PYTHONPATH"]])])
        shim_sees = {"KATANA_CHAOS_CLOCK": str(self.clocks), "KATANA_CHAOS_POISON": str(self.poison)}
        return shim_sees | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    @property
    def log_path(self) -> Path:
        return self.harness_folder / "chaos.log"

    def stop(self, timeout_s: float = 40.0) -> int:
        """Ctrl-C. Returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Wait for `katana run` to end. Raises RunEnded with its last log lines if it does not."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RunEnded(f"katana run did not end within {timeout_s:.0f} s: {self.last_words()}") from None

    def check_alive(self) -> None:
        """Raises RunEnded when `katana run` has ended, or is about to be."""
        self.check_open()
        if self.process is None or self.process.poll() is not None:
            raise RunEnded(f"katana run ended: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return " | ".join(lines[-3:])[-800:]

    # --- processes ---------------------------------------------------------------------------------------------

    def pids(self, role: str) -> list[int]:
        """Processes of a role that `katana run` started, the oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in self._extra:
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                begun = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
            except (OSError, IndexError):
                continue
            if words[2:5] == [b"ops.cli", role.encode(), os.fsencode(self.folder / CONFIG)]:
                found.append((begun, int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def victim(self, role: str, rng: random.Random, timeout_s: float = 60.0) -> int:
        """A process of the role that is running (a worker: one that has sent heartbeats), the oldest half preferred."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            pids = self.pids(role)
            if role in WORKERS:
                live = set(self.worker_names(role))
                pids = [pid for pid in pids if pid in live]
            if pids:
                return rng.choice(pids)
            time.sleep(0.2)
        raise RunEnded(f"no {role} came to work within {timeout_s:.0f} s")

    def worker_names(self, role: str) -> dict[int, str]:
        """Live workers of a role: pid → the name that they have in Redis."""
        try:
            live = self.plane.live(within_s=3 * self.config.liveness.heartbeat_s)
        except redis.exceptions.RedisError:
            return {}
        names = [name for name, facts in live.items() if facts.get("role") == role]
        return {int(name.split("-")[-2]): name for name in names}

    def whole(self) -> bool:
        """Every process is there, and every worker at work."""
        wanted = dict.fromkeys(ROLES, 1) | {
            "rollout": self.config.rollout.workers,
            "teacher": self.config.teacher.workers,
        }
        if any(len(self.pids(role)) < count for role, count in wanted.items()):
            return False
        leases = [self.plane.client.exists(self.key(f"lease:{role}")) for role in ("feeder", "arbiter", "learner")]
        return all(leases) and all(
            len(self.worker_names(role)) >= wanted[role] and set(self.worker_names(role)) <= set(self.pids(role))
            for role in WORKERS
        )

    def spend_restart(self, role: str, times: int = 1) -> None:
        """Wait until a role may be ended once more without its supervisor giving it up."""
        while True:
            self.check_open()
            with self._lock:
                ended, now = self._ended[role], time.monotonic()
                while ended and now - ended[0] > 60:
                    ended.popleft()
                if len(ended) + times <= _RESTARTS_A_MINUTE + (times > 1):
                    ended.extend([now] * times)
                    return
            time.sleep(0.5)

    @contextlib.contextmanager
    def replacement(self, role: str) -> Any:
        """A second process of a role, on the same run; ended on leaving."""
        self.check_open()
        words = (role, str(self.folder / CONFIG), "--set", "metrics.port=0")
        environment = self._environment() | {"KATANA_RUN_KEY": self.run_key, "OMP_NUM_THREADS": "1"}
        process = start(katana(*words), self.log_path, environment)
        self._extra[process.pid] = process
        try:
            yield process
        finally:
            end([process], 30)
            del self._extra[process.pid]

    # --- the run in Redis, past the proxy ----------------------------------------------------------------------

    @property
    def run_key(self) -> str:
        return RunFolder(self.folder).run_key

    @property
    def plane(self) -> Plane:
        if self._plane is None:
            # Its own reads and writes may be repeated: it retries until Redis is back.
            client = redis.Redis.from_url(
                self.redis.url, socket_timeout=30.0, retry=Retry(ConstantBackoff(0.1), 300), retry_on_error=[*_AWAY]
            )
            self._plane = open_plane(self.config, client, self.run_key)
        return self._plane

    def key(self, name: str) -> str:
        return self.plane.key(name)

    def stage(self) -> Stage | None:
        """Progress of the work; None while Redis does not answer or does not know the run."""
        client = self.plane.client
        pipe = client.pipeline(transaction=False)
        shards = self.plane.shards
        for name in (*(f"chunks:{shard}" for shard in range(shards)), "scores", "trajectories"):
            pipe.xinfo_stream(self.key(name))
        pipe.get(self.key("cursor"))
        try:
            *streams, cursor = pipe.execute(raise_on_error=False)
        except (redis.exceptions.RedisError, OSError):
            return None
        if any(isinstance(one, Exception) for one in streams):
            return None
        last = [one["last-generated-id"] for one in streams]
        step = self._last_step()
        taken = step.unix_s if step else 0.0
        return Stage(
            chunks=max(last[:shards], key=order),
            scores=last[shards],
            verdicts=last[shards + 1],
            trained=taken if taken < time.time() + 1 else 0.0,
            admitted=int(cursor or 0),
        )

    def steps(self) -> int:
        step = self._last_step()
        return step.step if step else 0

    def _last_step(self) -> Step | None:
        return [None, *RunFolder(self.folder).steps.last(65536)][-1]

    def open_rollouts(self) -> set[str]:
        return {rid.decode() for rid in self.plane.client.smembers(self.key("open"))}

    def trained_between(self, after: int, last: int) -> set[str]:
        """Rollouts of the steps behind `after`, up to `last`."""
        steps = RunFolder(self.folder).trained()
        return {rid for step in steps if after < step.step <= last for rid in step.rids}


def order(entry: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split(b"-"))


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
