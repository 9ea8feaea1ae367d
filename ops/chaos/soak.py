"""`katana soak`: a run for a long time, its processes killed now and then; its memory must stay flat.

The kills are those of `katana chaos`, drawn from a seed. It reports violations of the checker's
statements, and memory of a process or of Redis that grows.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import redis

from common.config import Config
from common.files import write_json
from common.runfiles.names import MEMORY, SOAK
from ops.chaos.cluster import ROLES, Cluster, RunEnded
from ops.chaos.faults import KINDS, Scene
from ops.chaos.harness import CALM_S, begin, end, prepared
from ops.chaos.memory import CANNOT_TELL, GROWS, Growth, MemoryLog, draw, judge, warm_up_s
from ops.chaos.records import Violation

_KINDS = [f"{what}-{role}" for what in ("kill", "term") for role in ROLES]
_GAP_S = 75.0  # mean time between two kills
# After a kill a role is spared for so many of its warm-ups: a lifetime of one warm-up has no slope. The interval of a
# slope narrows with the power 1.5 of the judged time: a few long lifetimes show more than many short ones.
_SPARED_WARM_UPS = 3
_SAMPLE_S = 5.0


def soak(config: Config, *, minutes: float, seed: int) -> int:
    """Run for `minutes`; `soak.json`, `memory.jsonl` and `soak.png` in the run's folder. Returns the exit code.

    Raises ConfigError and ModelError before anything is started.
    """
    config = prepared(config)
    violations: list[Violation] = []
    kills: list[dict[str, Any]] = []
    verdicts: list[Growth] = []
    with Cluster(config) as cluster:
        try:
            begin(cluster)
            log = MemoryLog(cluster.folder / MEMORY)
            violations += _kill_now_and_then(cluster, log, kills, minutes, random.Random(seed))
            if not log.path.read_text():
                violations.append(Violation("memory stays flat", "", "no sample was taken"))
            violations += end(cluster, Scene(), CALM_S)
            verdicts = judge(log.path)
            print(*verdicts, sep="\n")
            violations += [
                Violation("memory stays flat", "", str(verdict)) for verdict in verdicts if verdict.word == GROWS
            ]
            draw(
                cluster.folder / "soak.png", log.path, f"{minutes:g} minutes, {len(kills)} processes ended, seed {seed}"
            )
        except (RunEnded, TimeoutError, redis.exceptions.RedisError) as error:
            violations.append(Violation("the run goes on", "", str(error)))
    write_json(
        config.run_dir / SOAK,
        {"kills": kills, "memory": list(map(str, verdicts)), "violations": [asdict(one) for one in violations]},
    )
    unknown = [verdict.role for verdict in verdicts if verdict.word == CANNOT_TELL]
    print(
        f"{minutes:g} minutes, {len(kills)} processes ended: {len(violations)} violations"
        + (f"; cannot tell whether memory grows: {', '.join(unknown)}" if unknown else "")
    )
    for violation in violations[:50]:
        print(f"violation: {violation.statement}: {violation.rid} {violation.detail}", file=sys.stderr)
    return 1 if violations else 0


def _kill_now_and_then(
    cluster: Cluster, log: MemoryLog, kills: list[dict[str, Any]], minutes: float, rng: random.Random
) -> list[Violation]:
    """What went wrong with the samples. Raises RunEnded."""
    began = time.monotonic()
    over = threading.Event()
    failed: list[Violation] = []
    spared_until: dict[str | None, float] = {}
    sampler = threading.Thread(target=_keep_sampling, args=(cluster, log, over, failed))
    sampler.start()
    try:
        while True:
            time.sleep(rng.expovariate(1 / _GAP_S))
            if time.monotonic() - began > 60 * minutes:
                break
            at = time.monotonic() - began
            due = [name for name in _KINDS if at >= spared_until.get(KINDS[name].role, 0.0)]
            if not due:
                continue
            kind = KINDS[rng.choice(due)]
            assert kind.role is not None
            spared_until[kind.role] = at + _SPARED_WARM_UPS * warm_up_s(kind.role)
            cluster.spend_restart(kind.role)
            note = kind.inject(cluster, rng, Scene(), cluster.victim(kind.role, rng))
            kills.append({"kind": kind.name, "at_s": time.monotonic() - began, "note": note})
            print(f"[{time.monotonic() - began:7.0f} s] {kind.name}", flush=True)
    finally:
        over.set()
        sampler.join()
    return failed


def _keep_sampling(cluster: Cluster, log: MemoryLog, over: threading.Event, failed: list[Violation]) -> None:
    places: dict[str, int] = {}
    try:
        while not over.wait(_SAMPLE_S):
            assert cluster.process is not None
            places = _places(cluster, places)
            used = cluster.plane.client.info("memory")["used_memory"]
            log.add(places | {"katana run": cluster.process.pid}, used)
    except Exception as error:
        failed.append(Violation("the harness works", "", f"samples of memory: {type(error).__name__}: {error}"))


def _places(cluster: Cluster, before: dict[str, int]) -> dict[str, int]:
    """Name → pid; a process keeps its name, a restarted one takes a free name."""
    places: dict[str, int] = {}
    for role in ROLES:
        pids = cluster.pids(role)
        names = [f"{role}-{number}" for number in range(len(pids))] if len(pids) > 1 else [role]
        places |= {name: before[name] for name in names if before.get(name) in pids}
        fresh = [pid for pid in pids if pid not in places.values()]
        places |= dict(zip((name for name in names if name not in places), fresh, strict=False))
    return places
