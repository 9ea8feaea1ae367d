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
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from actors.cursors import Cursors
from actors.vllm.weights import version_in
from common import own_packages
from common.config import Config
from common.config.sections import Vllm
from common.rids import rid_of
from common.runfiles.names import CONFIG
from common.runfiles.records import Step
from common.runfiles.run import RunFolder
from common.wire.plane import Plane
from common.wire.planes import open_planes
from ops.chaos.proxy import RedisProxy
from ops.chaos.servers import VllmServer, servers_of
from ops.reach.children import end, katana, start
from ops.reach.embedded import EmbeddedRedis
from ops.reach.left_over import SOCKETS, harness_folder
from ops.reach.run import with_redis
from ops.run.failures import mark_of
from ops.run.ranks import TITLE

ROLES = ("rollout", "teacher", "arbiter", "learner", "feeder")
WORKERS = ("rollout", "teacher")
RANK = TITLE
"""Stands for a role where the processes of a learner beside its rank 0 are looked for."""
_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
_SERVED_S = 60.0  # how long a fault waits for Redis to be started
_RESTARTS_A_MINUTE = 3  # `katana run` gives a child up that ends six times in a row without progress
_PROGRESS_S = 120.0  # without progress since it was last ended, until a role may be ended even so


class RunEnded(RuntimeError):
    """`katana run` ended while faults were injected. The message has its last log lines."""


class Missed(RuntimeError):
    """The fault found nothing to strike."""


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

    def __init__(self, config: Config, servers: int = 1) -> None:
        """`servers`: data servers; all but the first, the home, are reached without the proxy."""
        self.config = config
        self.folder = config.run_dir
        self.harness_folder = harness_folder(config.run_dir)
        self.redis = EmbeddedRedis(self.harness_folder, maxmemory_mb=config.redis.maxmemory_mb)
        self.others = [
            EmbeddedRedis(self.harness_folder / f"server-{place}", maxmemory_mb=config.redis.maxmemory_mb)
            for place in range(1, servers)
        ]
        self.clocks, self.poison = self.harness_folder / "clocks", self.harness_folder / "poison"
        self.busy_redis = threading.Lock()  # held by a fault that takes Redis away
        self.making_weights = threading.Lock()  # held by a fault that makes weights of another run
        self.closing = threading.Event()  # everything is being ended: no fault may begin or start anything
        # Faults that wait for a server to be started.
        self._wanted: queue.SimpleQueue[tuple[EmbeddedRedis, Future[None]]] = queue.SimpleQueue()
        self._sockets = Path(tempfile.gettempdir()) / f"{SOCKETS}{secrets.token_hex(8)}"  # made on entering
        self.proxy = RedisProxy(
            self._sockets / "redis.sock",
            Path(self.redis.url.removeprefix("unix://").partition("?")[0]),
            random.Random(config.seed),
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._extra: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, deque[float]] = defaultdict(deque)
        self._marks: dict[str, Hashable] = {}  # a role's progress when it was last ended
        self._lock = threading.Lock()
        self._plane: Plane | None = None

    # --- start and end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            shutil.rmtree(self.harness_folder, ignore_errors=True)
            self.clocks.mkdir(parents=True)
            self.poison.mkdir()
            self._sockets.mkdir(mode=0o700)
            for server in (self.redis, *self.others):
                server.start()
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
            for part in self._plane.parts:
                part.client.close()
        self.proxy.close()
        for server in (self.redis, *self.others):
            if server.running():
                _signal(server.pid, signal.SIGCONT)
            server.stop()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def restart_redis(self, server: EmbeddedRedis | None = None) -> None:
        """Start a server, by default the home, after a fault has killed it. Raises RunEnded once everything is being
        ended.

        The main thread does it (`serve`): a child that a short-lived thread starts does not end with the harness when
        that is killed, see `end_with_parent`.
        """
        self.check_open()
        server = server or self.redis
        if threading.current_thread() is threading.main_thread():
            server.start()
            return
        started: Future[None] = Future()
        self._wanted.put((server, started))
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
                    self._start_for(*self._wanted.get(timeout=0.05))
        except BaseException:  # Ctrl-C: nothing serves any more, and a fault's thread may still be waiting
            self.closing.set()
            raise

    def _start_for(self, server: EmbeddedRedis, started: Future[None]) -> None:
        try:
            server.start()
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
            if self.others:
                data = [str(config.redis.url), *(server.url for server in self.others)]
                config = config.model_copy(update={"redis": config.redis.model_copy(update={"data": data})})
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

    def patience(self, seconds: float) -> float:
        """How long something may take that takes at most `seconds` where no vLLM server has to start first."""
        return seconds + (self._vllm.start_timeout_s if self._vllm is not None and self._vllm.command else 0.0)

    @property
    def _vllm(self) -> Vllm | None:
        return self.config.rollout.vllm if self.config.rollout.engine == "vllm" else None

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

    def vllm_servers(self) -> list[VllmServer]:
        """Those that rollout workers have started, or those of `urls`; none with `rollout.engine: slots`."""
        return servers_of(self._vllm, self.pids("rollout"))

    def pids(self, role: str) -> list[int]:
        """Processes of a role that `katana run` started, the oldest first."""
        return self._running("ops.cli", role, str(self.folder / CONFIG))

    def pids_of_teacher(self, name: str) -> list[int]:
        """The workers of one of several teachers, the oldest first."""
        return self._running("ops.cli", "teacher", str(self.folder / CONFIG), "--teacher", name)

    def scored_by(self, teacher: str) -> int:
        """Tokens that the live workers of one of several teachers say they have scored."""
        live = self.plane.live(within_s=3 * self.config.liveness.heartbeat_s).values()
        return sum(int(facts.get("tokens", 0)) for facts in live if facts.get("teacher") == teacher)

    def nurseries(self) -> list[int]:
        """The process that `katana run` has its roles forked from; none where it uses none, or just starts it again."""
        return self._running("ops.cli.nursery", str(self.folder / CONFIG))

    def _running(self, *words: str) -> list[int]:
        """Processes whose command line, after the interpreter and `-m`, begins so; the oldest first."""
        found, wanted = [], list(map(os.fsencode, words))
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in self._extra:
                continue
            try:
                shown = (entry / "cmdline").read_bytes().split(b"\0")
                begun = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
            except (OSError, IndexError):
                continue
            if shown[2 : 2 + len(wanted)] == wanted:
                found.append((begun, int(entry.name)))
        return [pid for _, pid in sorted(found)]

    def victim(self, role: str, rng: random.Random, timeout_s: float = 60.0) -> int:
        """A process of the role that is running (a worker: one that has sent heartbeats), the oldest half preferred."""
        timeout_s = self.patience(timeout_s)
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
            "teacher": sum(teacher.workers for teacher in self.config.all_teachers.values()),
            RANK: self.config.learner.nproc_per_node - 1,
        }
        if any(len(self.pids(role)) < count for role, count in wanted.items()):
            return False
        leases = [
            part.client.exists(self.key(f"lease:{role}"))
            for role in ("feeder", "arbiter", "learner")
            for part in self.plane.parts
        ]
        return (
            all(leases)
            and all(
                len(self.worker_names(role)) >= wanted[role] and set(self.worker_names(role)) <= set(self.pids(role))
                for role in WORKERS
            )
            and self._servers_write()
        )

    def _servers_write(self) -> bool:
        """Whether every vLLM server has weights of the run."""
        servers, wanted = self.vllm_servers(), 0
        if self._vllm is not None:
            wanted = self.config.rollout.workers if self._vllm.command else len(self._vllm.urls)
        return len(servers) >= wanted and all(version_in(one.label(), self.run_key) is not None for one in servers)

    def spend_restart(self, role: str, times: int = 1) -> None:
        """Wait until a role may be ended once more without its supervisor giving it up: it has not ended too often
        within a minute, and it has made progress between two ends, or has had the time for it."""
        began = time.monotonic()
        while True:
            self.check_open()
            mark = mark_of(role, self.plane, self.folder)
            with self._lock:
                ended, now = self._ended[role], time.monotonic()
                while ended and now - ended[0] > 60:
                    ended.popleft()
                fresh = mark is not None and mark != self._marks.get(role)
                if len(ended) + times <= _RESTARTS_A_MINUTE + (times > 1) and (fresh or now - began > _PROGRESS_S):
                    ended.extend([now] * times)
                    self._marks[role] = mark
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
            clients = [
                redis.Redis.from_url(
                    server.url, socket_timeout=30.0, retry=Retry(ConstantBackoff(0.1), 300), retry_on_error=[*_AWAY]
                )
                for server in (self.redis, *self.others)
            ]
            self._plane = open_planes(self.config, clients, self.run_key)
        return self._plane

    def key(self, name: str) -> str:
        return self.plane.key(name)

    def stage(self) -> Stage | None:
        """Progress of the work; None while Redis does not answer or does not know the run. Of several servers the
        newest notice of all."""
        try:
            parts = [self._notices(part) for part in self.plane.parts]
            admitted = sum(int(part.client.get(self.key("cursor")) or 0) for part in self.plane.parts)
        except (redis.exceptions.RedisError, OSError):
            return None
        last = [max(ids, key=order) for ids in zip(*parts, strict=True)]
        step = self._last_step()
        taken = step.unix_s if step else 0.0
        return Stage(
            chunks=max(last[:-2], key=order),
            scores=last[-2],
            verdicts=last[-1],
            trained=taken if taken < time.time() + 1 else 0.0,
            admitted=admitted,
        )

    def _notices(self, part: Plane) -> list[bytes]:
        """The last notice of each stream that shows progress. Raises redis-py's errors."""
        pipe = part.client.pipeline(transaction=False)
        streams = [stream for teacher in part.teachers for stream in part.chunk_streams(teacher)]
        for name in (*streams, "scores", "trajectories"):
            pipe.xinfo_stream(self.key(name))
        return [bytes(one["last-generated-id"]) for one in pipe.execute()]

    def cursor(self) -> int:
        """All rollouts with a lower number have been admitted."""
        plane = self.plane
        counts = [int(part.client.get(self.key("cursor")) or 0) for part in plane.parts]
        return Cursors(counts, lambda number: plane.place_of(rid_of(number))).next

    def steps(self) -> int:
        step = self._last_step()
        return step.step if step else 0

    def _last_step(self) -> Step | None:
        return [None, *RunFolder(self.folder).steps.last(65536)][-1]

    def open_rollouts(self) -> set[str]:
        return {rid.decode() for part in self.plane.parts for rid in part.client.smembers(self.key("open"))}

    def trained_between(self, after: int, last: int) -> set[str]:
        """Rollouts of the steps behind `after`, up to `last`."""
        steps = RunFolder(self.folder).trained()
        return {rid for step in steps if after < step.step <= last for rid in step.rids}


def order(entry: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split(b"-"))


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
