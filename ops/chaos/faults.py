"""The faults that are injected into a run, from outside, as they happen to real clusters.

Each is a function of the cluster, a random generator and the scene; it returns when the fault is over (a killed
process is not waited for). It records deliberate damage in the scene first, so that the checker knows
what to excuse; a fault that finds no target raises Missed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import redis

from actors.cursors import Cursors
from common.config import Config
from common.footprint import least_bytes, maxmemory_mb
from common.rids import rid_of
from common.runfiles.names import CHECKPOINTS, WEIGHTS
from common.teachers import called
from common.wire.messages import ChunkTokens, MessageError, RolloutHead, ScoreDivergence
from common.wire.weights import newest_version
from ops.chaos.cluster import RANK, WORKERS, Cluster, Missed
from ops.chaos.proxy import Hits
from ops.chaos.recovery import continue_process, held_by, stopped
from ops.chaos.server_faults import give_other_weights, kill_server, pause_server
from ops.reach.embedded import EmbeddedRedis

_ALL = ("chunks", "scores", "verdicts", "trained", "admitted")
_MOVES = {"rollout": "chunks", "teacher": "scores", "arbiter": "verdicts", "learner": "trained", "feeder": "admitted"}
_AWAY = (redis.exceptions.RedisError, OSError)
_TRY_S = 30.0  # how long a fault looks for something to strike
_GO_ON_S = 120.0  # how long a run with little memory may take for a few steps, other faults under way
_REFUSE_S = 8.0  # within which a worker that goes on looks at new weights


@dataclass(slots=True)
class Scene:
    """What was done on purpose, for the checker to excuse. Faults run in threads: changes are single operations."""

    poisoned: set[str] = field(default_factory=set)
    rolled_back: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)  # open when Redis lost its data
    broken_notices: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


Inject = Callable[[Cluster, random.Random, Scene, int], str]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. `role`: whose process is struck, where it is one; `moves`: what shows that all is well again;
    `several`: whether it is for several data servers (True), for a single one (False) or for both; `ranks`: whether it
    is only for a learner of several processes; `rewards`: only for a run with `reward.mode`; `teachers`: only for
    several teachers; `vllm`: only where vLLM servers write, `own`: those that the run itself starts."""

    name: str
    inject: Inject
    role: str | None = None
    moves: tuple[str, ...] = _ALL
    several: bool | None = None
    ranks: bool = False
    rewards: bool = False
    teachers: bool = False
    vllm: Literal["", "any", "own"] = ""

    def lacks(self, config: Config, servers: int) -> str:
        """What a run of this config on so many data servers would need for it, and has instead; '' if it fits."""
        ranks, vllm = config.learner.nproc_per_node, config.rollout.vllm
        if self.ranks and ranks == 1:
            return f"learner.nproc_per_node 2 or more, found {ranks}"
        if self.rewards and config.reward.mode == "none":
            return "reward.mode grpo or reinforce_leave_one_out, found none"
        if self.teachers and len(config.all_teachers) == 1:
            return "teachers of two or more, found one teacher"
        if self.vllm and (config.rollout.engine != "vllm" or vllm is None):
            return f"rollout.engine vllm, found {config.rollout.engine}"
        if self.vllm == "own" and vllm is not None and vllm.urls:
            return (
                f"rollout.vllm.command: a server that the run starts, and starts again; found urls "
                f"{', '.join(vllm.urls)}"
            )
        if self.several not in (None, servers > 1):
            return f"--servers {'2 or more' if self.several else '1'}, found --servers {servers}"
        return ""

    @property
    def others_take_over(self) -> bool:
        """Whether the rest of the run is whole, so that it recovers while the victim is still dead or stopped."""
        strikes_one = self.name.startswith(("kill-", "term-", "pause-", "torn-checkpoint"))
        return strikes_one and not self.ranks and not self.rewards and not self.vllm

    @property
    def restarts(self) -> dict[str, int]:
        """By role, how often its supervisor will have to start a process anew."""
        if self.name in ("redis-lose", "data-server-lose"):
            return dict.fromkeys(("arbiter", "feeder", "learner"), 2)
        if self.teachers:
            return {"teacher": 2}
        return {self.role: 1} if self.role is not None and self.ends_process else {}

    @property
    def ends_process(self) -> bool:
        ends = self.name.startswith(("kill-", "term-", "torn-checkpoint"))
        return ends or (self.name.startswith("pause-") and self.role not in WORKERS)


def _kill(cluster: Cluster, _: random.Random, __: Scene, pid: int) -> str:
    os.kill(pid, signal.SIGKILL)
    return "kill -9"


def _kill_rank(cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    """A process of the learner beside rank 0, which must end with it, and leave nothing half done."""
    ranks = cluster.pids(RANK)
    if not ranks:
        raise Missed("the learner had no other rank")
    os.kill(rng.choice(ranks), signal.SIGKILL)
    return f"kill -9 of one of {len(ranks)} beside rank 0"


def _kill_rewarded(cluster: Cluster, _: random.Random, __: Scene, ___: int) -> str:
    """The learner, between the choice of a batch, whose groups are decided then, and the step."""
    mark = cluster.poison / "hold-batch"
    mark.touch()
    try:
        deadline = time.monotonic() + _TRY_S
        while not (held := mark.read_text().split()):
            cluster.check_open()
            if time.monotonic() > deadline:
                raise Missed(f"the learner came to no batch within {_TRY_S:.0f} s")
            time.sleep(0.05)
        os.kill(int(held[-1]), signal.SIGKILL)
    finally:
        mark.unlink()
    return "kill -9 with a batch in its hands"


def _terminate(cluster: Cluster, _: random.Random, __: Scene, pid: int) -> str:
    os.kill(pid, signal.SIGTERM)
    continue_process(pid)  # a stopped process would not receive it
    return "SIGTERM"


def _pause_worker(cluster: Cluster, rng: random.Random, _: Scene, pid: int, role: str) -> str:
    """Stopped until others have taken over what it held; it goes on at a moment when they are at work on it."""
    began = time.monotonic()
    with stopped(pid):
        held = held_by(cluster, role, pid)
        if role == "rollout" and not held.rollouts:
            raise Missed("the worker held no rollout")
        name = cluster.worker_names(role).get(pid, "").encode()
        limit = 3 * cluster.config.liveness.claim_s
        while time.monotonic() - began < limit and not _taken_over(cluster, held.rollouts, name):
            if role == "teacher" and time.monotonic() - began > cluster.config.liveness.claim_s + 2:
                break
            time.sleep(0.02)
        if role == "rollout" and not _taken_over(cluster, held.rollouts, name):
            raise Missed(f"its rollouts were not taken over within {limit:.0f} s")
        time.sleep(rng.choice((0.0, rng.uniform(0, 1))))
    return f"stopped {time.monotonic() - began:.1f} s"


def _taken_over(cluster: Cluster, rollouts: dict[str, int], name: bytes) -> bool:
    if not rollouts:
        return False
    workers = cluster.plane.fields((rid, ["worker"]) for rid in rollouts)
    return any(worker not in (None, name) for (worker,) in workers)


def _pause_holder(cluster: Cluster, rng: random.Random, _: Scene, pid: int, role: str) -> str:
    """The holder of a lease stopped, its replacement started and at work, then the former one goes on."""
    began = time.monotonic()
    holder = cluster.key(f"holder:{role}")
    before = cluster.plane.client.get(holder)
    with cluster.replacement(role):
        with stopped(pid):
            limit = cluster.config.liveness.learner_lease_s + 45
            while cluster.plane.client.get(holder) == before and time.monotonic() - began < limit:
                time.sleep(0.05)
            if cluster.plane.client.get(holder) == before:
                raise Missed(f"not replaced within {limit:.0f} s")
            time.sleep(rng.uniform(0.2, 1.5))
        time.sleep(rng.uniform(1.0, 3.0))  # both run: the former one must notice
    return f"stopped {time.monotonic() - began:.1f} s, replaced"


def _nursery_kill(cluster: Cluster, _: random.Random, __: Scene, ___: int) -> str:
    """The process that roles are forked from: it comes back, and no role ends with it."""
    before = cluster.nurseries()
    if not before:
        raise Missed("there is no nursery, or it was just killed")
    roles = {pid for role in _MOVES for pid in cluster.pids(role)}
    os.kill(before[-1], signal.SIGKILL)
    deadline = time.monotonic() + _TRY_S
    while not set(cluster.nurseries()) - set(before):
        cluster.check_alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"no other nursery within {_TRY_S:.0f} s")
        time.sleep(0.05)
    left = {pid for role in _MOVES for pid in cluster.pids(role)}
    return f"kill -9; {len(roles & left)} of {len(roles)} roles go on in the same process"


def _redis_kill(cluster: Cluster, _: random.Random, __: Scene, ___: int) -> str:
    with cluster.busy_redis:
        os.kill(cluster.redis.pid, signal.SIGKILL)
        time.sleep(3.0)
        cluster.restart_redis()
    return "down for 3 s, append-only file kept"


def _data_server_kill(cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    """One of several data servers, not the home: that one `redis-kill` kills."""
    server, seconds = rng.choice(cluster.others), rng.uniform(1.0, 5.0)
    with cluster.busy_redis:
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(seconds)
        cluster.restart_redis(server)
    place = cluster.others.index(server) + 2
    return f"server {place} of {len(cluster.others) + 1} down for {seconds:.1f} s, append-only file kept"


def _data_server_lose(cluster: Cluster, rng: random.Random, scene: Scene, __: int) -> str:
    """One of several data servers, not the home: the others' rollouts must go on."""
    place = rng.randrange(1, len(cluster.others) + 1)
    server = cluster.others[place - 1]
    with cluster.busy_redis:
        before = {rid for rid in _at_stake(cluster) if cluster.plane.place_of(rid) == place}
        _lose(cluster, scene, server, before)
    return f"server {place + 1} of {len(cluster.others) + 1} down for 1 s, nothing left on disk"


def _redis_lose(cluster: Cluster, _: random.Random, scene: Scene, __: int) -> str:
    with cluster.busy_redis:
        _lose(cluster, scene, cluster.redis, _at_stake(cluster))
    return "down for 1 s, nothing left on disk"


def _lose(cluster: Cluster, scene: Scene, server: EmbeddedRedis, at_stake: set[str]) -> None:
    with scene.lock:
        scene.lost |= at_stake
    os.kill(server.pid, signal.SIGKILL)
    time.sleep(1.0)
    for path in server.folder.iterdir():
        if path.name.startswith(("appendonly", "dump.rdb", "temp-")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cluster.restart_redis(server)


def _at_stake(cluster: Cluster) -> set[str]:
    """Rollouts that a loss of Redis may take: the open ones, and those that are admitted until it is dead.

    Without a cursor Redis has just lost the run, and the rollouts at stake were recorded then.
    """
    learner, plane = cluster.config.learner, cluster.plane
    soon = 2 * learner.fresh_steps * learner.batch_size
    counts = [part.client.get(part.key("cursor")) for part in plane.parts]
    cursors = Cursors([int(count or 0) for count in counts], lambda number: plane.place_of(rid_of(number)))
    coming = range(cursors.next, cursors.end + soon) if any(counts) else range(0)
    return cluster.open_rollouts() | {rid_of(number) for number in coming}


def _redis_pause(_cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    seconds = rng.choice((3.0, 5.0, 8.0, 20.0))
    with _cluster.busy_redis, stopped(_cluster.redis.pid):
        time.sleep(seconds)
    return f"stopped {seconds:.0f} s"


def _redis_full(cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    client, seconds = cluster.plane.client, rng.uniform(2.0, 6.0)
    with cluster.busy_redis:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", int(used * 0.97))
        try:
            exceeded, until = False, time.monotonic() + seconds
            while time.monotonic() < until:
                memory = client.info("memory")
                exceeded |= memory["used_memory"] > memory["maxmemory"] > 0
                time.sleep(0.1)
        finally:
            client.config_set("maxmemory", cluster.redis.maxmemory_mb << 20)
    if not exceeded:
        raise Missed("its memory was never above the limit")
    return f"{used >> 10} kB in use, 97 % of it allowed for {seconds:.1f} s"


def _redis_small(cluster: Cluster, _: random.Random, __: Scene, ___: int) -> str:
    """No more memory from now on than a run needs at least; kinds that start Redis anew, or fill it, leave it so."""
    small = maxmemory_mb(least_bytes(cluster.config))
    with cluster.busy_redis:
        cluster.redis.maxmemory_mb = small
        cluster.plane.client.config_set("maxmemory", small << 20)
    before, limit = cluster.steps(), cluster.patience(_GO_ON_S)
    deadline = time.monotonic() + limit
    while cluster.steps() < before + 2 * cluster.config.checkpoints.every_steps:
        cluster.check_open()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{cluster.steps() - before} steps within {limit:.0f} s with {small} MB")
        time.sleep(0.2)
    return f"{small} MB from now on: {cluster.steps() - before} steps in {time.monotonic() - deadline + limit:.1f} s"


def _network(cluster: Cluster, rng: random.Random, _: Scene, __: int, what: str) -> str:
    """Spoil one worker's connection until it has been hit at least once."""
    deadline = time.monotonic() + _TRY_S
    while time.monotonic() < deadline:
        cluster.check_open()
        role = rng.choice(WORKERS)
        pid, seconds = cluster.victim(role, rng), rng.uniform(2.0, 4.0)
        hits = _spoil(cluster, rng, pid, what, seconds)
        time.sleep(seconds)
        if total := sum(astuple(hits)):
            return f"{role} for {seconds:.1f} s: {total} times"
    raise Missed(f"no request of a worker came through within {_TRY_S:.0f} s")


def _spoil(cluster: Cluster, rng: random.Random, pid: int, what: str, seconds: float) -> Hits:
    if what == "delay":
        return cluster.proxy.delay(pid, rng.uniform(0.05, 0.5), seconds)
    if what == "duplicate":
        return cluster.proxy.duplicate(pid, seconds, reads=True)
    if what == "swap":
        return cluster.proxy.swap(pid, seconds, reads=True)
    return cluster.proxy.cut(pid)


# --- what is broken on purpose ------------------------------------------------------------------------------------

_JUNK: dict[str, tuple[dict[str, bytes], ...]] = {
    "prompts": ({"rid": b"\xff\xfe"}, {"nothing": b"here"}, {"rid": b"x" * 500}, {"rid": b"r999999999"}),
    "chunks": (
        {"rid": b"r0", "seq": b"-1"},
        {"rid": b"r0"},
        {"rid": b"../../etc", "seq": b"0"},
        {"rid": b"r0", "seq": b"9" * 19},
        {"rid": b"r999999999", "seq": b"0"},
    ),
    "scores": ({"rid": b"\x00\x01"}, {"r": b"r0"}, {"rid": b""}, {"rid": b"r999999999"}),
    "trajectories": ({"rid": b"r999999999"}, {"rid": b"{}"}, {"body": b"\x93\x01\x02\x03"}),
    "finished": (
        {"kind": b"verdict", "rid": b"r999999999", "body": b"\xc1\xc1\xc1"},
        {"kind": b"ending", "rid": b"r999999999", "ending": b"sold"},
        {"kind": b"count", "rid": b"r999999999", "generated": b"-7"},
        {"rid": b"r999999999"},
        {"kind": b"verdict", "body": b"\x9a" + b"\x90" * 4000},
    ),
}


def _malformed(cluster: Cluster, rng: random.Random, scene: Scene, _: int, stream: str) -> str:
    """Put an entry into a stream that no one of ours writes; wait until it was taken off."""
    fields: Any = rng.choice(_JUNK[stream])
    teacher = rng.choice(cluster.plane.teachers)
    name = rng.choice(cluster.plane.chunk_streams(teacher)) if stream == "chunks" else stream
    client, key = cluster.plane.client, cluster.key(name)
    with cluster.busy_redis:
        scene.broken_notices += 1
        entry = client.xadd(key, fields)
    deadline = time.monotonic() + cluster.patience(90.0)
    while time.monotonic() < deadline:
        cluster.check_open()
        with contextlib.suppress(Exception):  # Redis may be away by another fault: it is asked again
            if not client.xrange(key, entry, entry):
                return f"{fields!r:.60} taken off"
        time.sleep(0.05)
    raise TimeoutError(f"{fields!r:.60} still stands in {name}")


# Only if it has no verdict yet; recorded before it is done.
_CORRUPT = """
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[1], 'verdict') == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""


def _poison(cluster: Cluster, rng: random.Random, scene: Scene, _: int) -> str:
    """Corrupt the record of a rollout that is being written or scored."""
    deadline = time.monotonic() + _TRY_S
    client = cluster.plane.client
    while time.monotonic() < deadline:
        cluster.check_open()
        with contextlib.suppress(Exception):
            rids = sorted(cluster.open_rollouts() - scene.poisoned)
            rid = rng.choice(rids)
            record = cluster.plane.rollout(rid)
            if b"verdict" not in record and b"head" in record:
                name, value, how = _broken(rng, record)
                with scene.lock:
                    scene.poisoned.add(rid)
                if client.eval(_CORRUPT, 1, cluster.key(f"rollout:{rid}"), name, value):
                    return f"{rid}: {how}"
                with scene.lock:
                    scene.poisoned.discard(rid)
        time.sleep(0.1)
    raise Missed("no rollout without a verdict was open")


_DEAD_S = 90.0  # within which a rollout that cannot be written, scored or trained on is dead


def _unusable(cluster: Cluster, rng: random.Random, scene: Scene, _: int, what: str) -> str:
    """Make a rollout impossible to write, score or train on, and wait until it is dead."""
    field, ready = ("settled", b"verdict") if what == "step" else ("verdict", b"head")
    record = cluster.plane.rollout(rid := rng.choice(sorted(cluster.open_rollouts() - scene.poisoned) or ["none"]))
    if record.get(ready) in (None, b"dead") or field.encode() in record:
        raise Missed("the rollout was not at the right place")
    mark = cluster.poison / f"{what}-{rid}"
    with scene.lock:
        scene.poisoned.add(rid)
    mark.touch()
    deadline = time.monotonic() + (limit := cluster.patience(_DEAD_S))
    while time.monotonic() < deadline:
        cluster.check_open()
        time.sleep(0.05)
        try:
            [(found, head)] = cluster.plane.fields([(rid, [field, "head"])])
        except _AWAY:  # by another fault
            continue
        if found == b"dead":
            return f"{rid} dead"
        if found is not None or head is None:  # it came through before it was marked, or another fault took it
            struck = set(mark.read_text().split())
            mark.unlink()
            if what == "step" and found and len(struck) > 1:
                raise TimeoutError(f"{len(struck)} learners failed on {rid}, and it ended as {found.decode()}")
            raise Missed(f"{rid} had ended before")
    raise TimeoutError(f"{rid} is not dead after {limit:.0f} s")


def _broken(rng: random.Random, record: dict[bytes, bytes]) -> tuple[str, bytes, str]:
    """A field of a rollout's hash, what to write there, and what is wrong with it."""
    last = int(record.get(b"chunks", b"0")) - 1
    choices: list[tuple[str, bytes, str]] = [("head", b"\xc1 not msgpack", "head is not msgpack")]
    if last >= 0:
        chunk = record[b"t:%d" % last]
        choices += [
            (f"t:{last}", chunk[: len(chunk) // 2], "tokens cut off in the middle"),
            (f"t:{last}", _out_of_range(chunk), "token ids outside the vocabulary"),
            (f"p:{last}", record[b"p:%d" % last][:-5] + b"\x00\x00\xc0\x7f\x00", "support of wrong sizes"),
            (f"d:{last}", _not_a_number(last), "a divergence that is not a number"),
            ("threshold", b"nan", "a threshold that is not a number"),
        ]
        view = record.get(b"v:%d" % last)
        choices += [(f"v:{last}", view[:-3], "a view cut off at its end")] if view else []
    return rng.choice(choices)


def _out_of_range(encoded: bytes) -> bytes:
    try:
        chunk = ChunkTokens.decode(encoded)
    except MessageError:
        return b""
    return encoded.replace(chunk.tokens.tobytes(), np.full(len(chunk.tokens), 1 << 30, np.int32).tobytes())


def _not_a_number(seq: int) -> bytes:
    good = ScoreDivergence(seq=seq, divergence=np.array([0.5, 0.5], np.float32))
    return good.encode().replace(np.float32(0.5).tobytes(), np.float32(np.nan).tobytes())


def _slow_teacher(cluster: Cluster, rng: random.Random, _: Scene, pid: int) -> str:
    """A teacher that gets a tenth of its time."""
    seconds = rng.uniform(4.0, 8.0)
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            cluster.check_open()
            with stopped(pid):
                time.sleep(0.18)
            time.sleep(0.02)
    return f"a tenth of its time for {seconds:.1f} s"


def _teacher_away(cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    """All workers of one of several teachers gone for longer than a takeover takes, then killed. Meanwhile nobody may
    take over their chunks, and the rollouts of another teacher go on."""
    away = rng.choice(cluster.plane.teachers)
    others = [name for name in cluster.plane.teachers if name != away]
    pids, began = cluster.pids_of_teacher(away), time.monotonic()
    if not pids:
        raise Missed(f"{called(away)} had no worker")
    with contextlib.ExitStack() as away_now:
        for pid in pids:
            away_now.enter_context(stopped(pid))
        waiting = _in_flight(cluster, others)
        if not waiting:
            raise Missed(f"no rollout of another teacher than {away} was in flight")
        before = {name: cluster.scored_by(name) for name in waiting}
        while (away_s := time.monotonic() - began) < cluster.config.liveness.claim_s + 4 or before:
            cluster.check_open()
            if away_s > _GO_ON_S:
                raise TimeoutError(f"without {called(away)} none of {', '.join(before)} scored for {_GO_ON_S:.0f} s")
            with contextlib.suppress(*_AWAY):
                if any(cluster.scored_by(name) > count for name, count in before.items()):
                    before = {}
            time.sleep(0.2)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return f"{called(away)} away for {away_s:.1f} s, kill -9 of {len(pids)}; {', '.join(waiting)} went on"


def _in_flight(cluster: Cluster, teachers: Sequence[str]) -> list[str]:
    """Those of the teachers that have rollouts without a verdict."""
    facts = cluster.plane.fields((rid, ["head", "verdict"]) for rid in sorted(cluster.open_rollouts()))
    found = {RolloutHead.decode(head).scored_by for head, verdict in facts if head and verdict is None}
    return [name for name in teachers if name in found]


def _torn_checkpoint(cluster: Cluster, rng: random.Random, scene: Scene, pid: int) -> str:
    """Tear the newest checkpoint and kill the learner, which must continue from the one before."""
    with stopped(pid):
        folders = sorted((cluster.folder / CHECKPOINTS).glob("step-????????"))
        if len(folders) < 2:
            raise Missed("there are not two whole checkpoints")
        newest, before = folders[-1], folders[-2]
        with scene.lock:
            # Later trajectories were never acknowledged: they are trained again and need no excuse.
            scene.rolled_back |= cluster.trained_between(int(before.name[5:]), int(newest.name[5:]))
        path = rng.choice(sorted(newest.iterdir()))
        _tear(path, rng)
        os.kill(pid, signal.SIGKILL)
    return f"{newest.name}/{path.name}"


def _torn_weights(cluster: Cluster, rng: random.Random, _: Scene, pid: int) -> str:
    """Tear a published file before one of the rollout workers has read it."""
    folder = cluster.folder / WEIGHTS
    with stopped(pid):
        version = newest_version(folder)
        deadline = time.monotonic() + cluster.config.liveness.claim_s * 0.75
        while newest_version(folder) == version:
            if time.monotonic() > deadline:
                raise Missed("no weights were published while the worker was stopped")
            time.sleep(0.005)
        path = folder / f"v{newest_version(folder):08d}.safetensors"
        _tear(path, rng)
        log_path = Path(f"/proc/{pid}/fd/2").resolve()  # logs/rollout-*.log
        before = log_path.stat().st_size
    deadline = time.monotonic() + _REFUSE_S
    while time.monotonic() < deadline:
        with log_path.open("rb") as log:
            log.seek(before)
            if b"weights refused" in log.read():
                return f"{path.name} refused"
        time.sleep(0.1)
    raise Missed("the worker never looked at the torn weights")


def _tear(path: Path, rng: random.Random) -> None:
    """Cut a file off, or change a byte of it."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        data = data[:place]
    else:
        data[place] ^= 0x10
    path.write_bytes(bytes(data))


def _clock(cluster: Cluster, rng: random.Random, _: Scene, __: int) -> str:
    """Shift the wall clock of one process, of any role, backward or forward by a minute to ten days."""
    role = rng.choice(list(_MOVES))
    pid = cluster.victim(role, rng)
    shift = rng.choice((-1, 1)) * rng.choice((60.0, 3600.0, 864_000.0))
    path = cluster.clocks / str(pid)
    path.write_text(str(shift))
    time.sleep(rng.uniform(3.0, 6.0))
    path.unlink()
    return f"{role} by {shift:+.0f} s"


def _kinds() -> Iterator[Kind]:
    for role, what in _MOVES.items():
        pause = _pause_worker if role in WORKERS else _pause_holder
        yield Kind(f"kill-{role}", _kill, role, (what,))
        yield Kind(f"term-{role}", _terminate, role, (what,))
        yield Kind(f"pause-{role}", partial(pause, role=role), role, (what,))
    yield Kind("kill-rank", _kill_rank, "learner", ("trained",), ranks=True)
    yield Kind("kill-rewarded", _kill_rewarded, "learner", ("trained",), rewards=True)
    yield Kind("nursery-kill", _nursery_kill)
    yield Kind("redis-kill", _redis_kill)
    yield Kind("data-server-kill", _data_server_kill, several=True)
    yield Kind("data-server-lose", _data_server_lose, several=True)
    yield Kind("redis-lose", _redis_lose, several=False)
    yield Kind("redis-pause", _redis_pause)
    yield Kind("redis-full", _redis_full, several=False)
    yield Kind("redis-small", _redis_small, several=False)
    for what in ("delay", "duplicate", "swap", "cut"):
        yield Kind(f"net-{what}", partial(_network, what=what))
    for stream in _JUNK:
        yield Kind(f"malformed-{stream}", partial(_malformed, stream=stream), several=False)
    yield Kind("poison-rollout", _poison, several=False)
    yield Kind("poison-write", partial(_unusable, what="write"), several=False)
    yield Kind("poison-score", partial(_unusable, what="score"), several=False)
    yield Kind("poison-step", partial(_unusable, what="step"), several=False)
    yield Kind("slow-teacher", _slow_teacher, "teacher")
    yield Kind("teacher-away", _teacher_away, teachers=True)
    yield Kind("torn-checkpoint", _torn_checkpoint, "learner", ("trained",))
    yield Kind("torn-weights", _torn_weights, "rollout")
    yield Kind("clock-shift", _clock)
    yield Kind("kill-vllm", kill_server, moves=("chunks",), vllm="own")
    yield Kind("pause-vllm", pause_server, moves=("chunks",), vllm="own")
    yield Kind("stale-vllm", give_other_weights, moves=("chunks",), vllm="any")


KINDS = {kind.name: kind for kind in _kinds()}


def kinds_for(config: Config, servers: int = 1) -> list[str]:
    """The kinds of faults that fit a run of this config on so many data servers."""
    return [kind.name for kind in KINDS.values() if not kind.lacks(config, servers)]
