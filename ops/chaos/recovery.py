"""Whether a run has recovered from a fault: the victim's work has continued, and waiting processes act again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import redis

from common.wire.entries import bare, place_in, tagged
from ops.chaos.cluster import WORKERS, Cluster, RunEnded, Stage, order

RECOVERY_TIMEOUT_S = 120.0
_POLL_S = 0.05
_HOLDING_S = 60.0
_SETTLE_S = 0.02  # requests that a process sent before it was stopped have arrived by then


@dataclass(frozen=True, slots=True)
class Held:
    """The work that a worker held when the fault struck it."""

    rollouts: dict[str, int] = field(default_factory=dict)  # rid → chunks that were stored
    notices: dict[str, set[bytes]] = field(default_factory=dict)  # stream → entries that it was given


def held_by(cluster: Cluster, role: str, pid: int) -> Held:
    """Rollouts that a rollout worker owns, or chunk notices that a teacher was given."""
    name = cluster.worker_names(role).get(pid)
    if name is None:
        return Held()
    plane = cluster.plane
    if role == "rollout":
        rids = sorted(cluster.open_rollouts())
        facts = plane.fields((rid, ["worker", "verdict", "finish", "chunks"]) for rid in rids)
        return Held(
            rollouts={
                rid: int(chunks or 0)
                for rid, (worker, verdict, finish, chunks) in zip(rids, facts, strict=True)
                if worker == name.encode() and verdict is None and finish is None
            }
        )
    notices: dict[str, set[bytes]] = {}
    for place, part in enumerate(plane.parts):
        for stream in (stream for teacher in plane.teachers for stream in plane.chunk_streams(teacher)):
            entries = part.client.xpending_range(plane.key(stream), "teacher", "-", "+", 1000, consumername=name)
            if entries:
                notices.setdefault(stream, set()).update(tagged(one["message_id"], place) for one in entries)
    return Held(notices=notices)


def work_has_continued(cluster: Cluster, held: Held) -> bool:
    """Every rollout has a new chunk, a verdict, or is booked; every notice was taken off."""
    plane = cluster.plane
    rids = list(held.rollouts)
    for rid, (chunks, verdict) in zip(rids, plane.fields((rid, ["chunks", "verdict"]) for rid in rids), strict=True):
        if chunks is not None and verdict is None and int(chunks) <= held.rollouts[rid]:
            return False
    for stream, entries in held.notices.items():
        for entry, server in ((bare(one), plane.parts[place_in(one)].client) for one in entries):
            if server.xrange(plane.key(stream), entry, entry):
                return False
    return True


def moved(before: Stage, now: Stage, what: tuple[str, ...]) -> bool:
    """Each of these fields of the stage has grown. (A step that was rolled back is a change, but not progress.)"""
    return all(_place(getattr(before, name)) < _place(getattr(now, name)) for name in what)


def _place(value: bytes | float) -> tuple[float, ...]:
    return order(value) if isinstance(value, bytes) else (value,)


def holder_of(cluster: Cluster, role: str | None) -> bytes | None:
    """Who holds, or held last, the lease of a role; None for workers, who hold none."""
    value = None if role is None or role in WORKERS else cluster.plane.client.get(cluster.key(f"holder:{role}"))
    return value if isinstance(value, bytes) else None


def wait_recovered(
    cluster: Cluster,
    before: Stage | None,
    held: Held,
    began: float,
    what: tuple[str, ...],
    replaced: tuple[str, bytes] | None,
    check: Callable[[], object],
) -> float:
    """Seconds from `began` (monotonic) until `what` has moved and the held work has continued.

    `before`: the progress before the fault; None: the progress once Redis answers and has the run. `check` is called
    repeatedly, and may raise. `replaced`: a role and its former holder, whose last actions do not count: progress is
    measured from the moment when another holds the lease. Raises TimeoutError, RunEnded.
    """
    limit = cluster.patience(RECOVERY_TIMEOUT_S)
    while time.monotonic() - began < limit:
        cluster.check_alive()
        check()
        try:
            now = cluster.stage()
            before = before or now
            if now is None or before is None:
                pass
            elif replaced is not None and holder_of(cluster, replaced[0]) not in (None, replaced[1]):
                before, replaced = now, None
            elif replaced is None and moved(before, now, what) and work_has_continued(cluster, held):
                return time.monotonic() - began
        except (redis.exceptions.RedisError, OSError):
            pass  # Redis does not answer: the fault itself, or another one
        time.sleep(_POLL_S)
    raise TimeoutError(f"no recovery within {limit:.0f} s")


def stop_holding(cluster: Cluster, role: str, pid: int) -> tuple[float, Held]:
    """Stop a process (a worker: at a moment when it holds something): when (monotonic), and what it holds.

    It is stopped before it is inspected, so that it cannot finish its work meanwhile. Raises TimeoutError.
    """
    limit = cluster.patience(_HOLDING_S)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        cluster.check_alive()
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        stopped = False
        try:
            time.sleep(_SETTLE_S)
            held = held_by(cluster, role, pid) if role in WORKERS else Held()
            stopped = bool(held.rollouts or held.notices) or role not in WORKERS
            if stopped:
                return began, held
        finally:
            if not stopped:
                continue_process(pid)
        time.sleep(0.02)
    raise TimeoutError(f"the {role} worker held nothing for {limit:.0f} s")


def continue_process(pid: int) -> None:
    """Continue a stopped process (SIGCONT); does nothing if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing inside. Raises ProcessLookupError if one is gone before."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            continue_process(pid)


def wait_whole(cluster: Cluster, timeout_s: float = 90.0) -> None:
    """Wait until every process is at work again, so that the next fault strikes a healthy run. Raises TimeoutError."""
    timeout_s = cluster.patience(timeout_s)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        cluster.check_alive()
        try:
            if cluster.whole():
                return
        except (redis.exceptions.RedisError, OSError, RunEnded):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"the run was not healthy again within {timeout_s:.0f} s")
