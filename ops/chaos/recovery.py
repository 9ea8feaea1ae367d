"""When a run has recovered from a fault: what the victim held has gone on, and those who stood still act again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import redis

from ops.chaos.cluster import WORKERS, Cluster, RunEnded, Stage

RECOVERY_TIMEOUT_S = 120.0
_POLL_S = 0.05
_HOLDING_S = 60.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a worker held when it was struck."""

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
    for shard in range(plane.shards):
        stream = f"chunks:{shard}"
        entries = plane.client.xpending_range(plane.key(stream), "teacher", "-", "+", 1000, consumername=name)
        if entries:
            notices[stream] = {one["message_id"] for one in entries}
    return Held(notices=notices)


def gone_on(cluster: Cluster, held: Held) -> bool:
    """Every rollout has a new chunk, a verdict, or is booked; every notice was taken off."""
    plane = cluster.plane
    rids = list(held.rollouts)
    for rid, (chunks, verdict) in zip(rids, plane.fields((rid, ["chunks", "verdict"]) for rid in rids), strict=True):
        if chunks is not None and verdict is None and int(chunks) <= held.rollouts[rid]:
            return False
    for stream, entries in held.notices.items():
        if any(plane.client.xrange(plane.key(stream), entry, entry) for entry in entries):
            return False
    return True


def moved(before: Stage, now: Stage, what: tuple[str, ...]) -> bool:
    """Each of these fields of the stage has changed."""
    return all(getattr(before, name) != getattr(now, name) for name in what)


def holder_of(cluster: Cluster, role: str | None) -> bytes | None:
    """Who holds, or held last, the lease of a role; None for workers, who hold none."""
    value = None if role is None or role in WORKERS else cluster.plane.client.get(cluster.key(f"holder:{role}"))
    return value if isinstance(value, bytes) else None


def wait_recovered(
    cluster: Cluster, before: Stage, held: Held, began: float, what: tuple[str, ...], replaced: tuple[str, bytes] | None
) -> float:
    """Seconds from `began` (monotonic) until `what` has moved and what was held has gone on.

    `replaced`: a role and its former holder, whose last deeds do not count: what has moved is looked at from the moment
    when another holds the lease. Raises TimeoutError, RunEnded.
    """
    while time.monotonic() - began < RECOVERY_TIMEOUT_S:
        cluster.check_alive()
        try:
            now = cluster.stage()
            if now is not None and replaced is not None and holder_of(cluster, replaced[0]) not in (None, replaced[1]):
                before, replaced = now, None
            elif now is not None and replaced is None and moved(before, now, what) and gone_on(cluster, held):
                return time.monotonic() - began
        except (redis.exceptions.RedisError, OSError):
            pass  # Redis is away: the fault itself, or another one
        time.sleep(_POLL_S)
    raise TimeoutError(f"no recovery within {RECOVERY_TIMEOUT_S:.0f} s")


def wait_holding(cluster: Cluster, role: str, pid: int) -> Held:
    """What a worker holds, at a moment when it holds something. Raises TimeoutError."""
    deadline = time.monotonic() + _HOLDING_S
    while time.monotonic() < deadline:
        cluster.check_alive()
        held = held_by(cluster, role, pid)
        if held.rollouts or held.notices:
            return held
        time.sleep(0.005)
    raise TimeoutError(f"the {role} worker held nothing for {_HOLDING_S:.0f} s")


def wait_whole(cluster: Cluster, timeout_s: float = 90.0) -> None:
    """Wait until every process is at work again, so that the next fault strikes a whole run. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        cluster.check_alive()
        try:
            if cluster.whole():
                return
        except (redis.exceptions.RedisError, OSError, RunEnded):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"the run was not whole again within {timeout_s:.0f} s")
