"""`katana chaos`: a run under a schedule of faults that is drawn from a seed, then the checker.

First come the faults that are injected alone, each into a healthy run, so that its recovery can be timed;
then the others, which overlap. Then a quiet phase, in which all open rollouts must end. The run is then
interrupted, resumed for a few more steps, and ends; the checker reads its folder and its Redis.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import redis

from common.config import Config, ConfigError
from common.failing import brief
from common.files import write_json
from common.runfiles.making import move_aside
from common.runfiles.names import CHAOS, RUN
from ops.chaos.checker import Allowed, check_folder, check_redis, count_folder
from ops.chaos.cluster import Cluster, Missed, RunEnded
from ops.chaos.faults import KINDS, Kind, Scene, kinds_for
from ops.chaos.records import Violation
from ops.chaos.recovery import Held, continue_process, holder_of, stop_holding, wait_recovered, wait_whole
from ops.chaos.schedule import ChaosResult, Fault, schedule
from ops.chaos.table import describe
from ops.chaos.written import Witness, check_written
from ops.run.check import check

_GAP_S = 2.0  # mean time between two faults that may overlap
_AT_ONCE = 6  # most faults under way at a time
_TRIES = 6  # of a fault that finds no target
_START_S, _END_S = 180.0, 240.0
CALM_S = 120.0  # how long what is open when the faults end may take
_OTHERS_FIRST = (
    ProcessLookupError,
    FileNotFoundError,
    redis.exceptions.ResponseError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
)
_NEVER = 10_000_000  # steps: the run is ended by the harness


def chaos(
    config: Config, *, seed: int, faults: int, kinds: Sequence[str], calm_s: float = CALM_S, servers: int = 1
) -> ChaosResult:
    """Run on so many data servers, injure, check. The run's folder and `chaos.json` in it stay.

    Raises ConfigError and ModelError before anything is started.
    """
    result = ChaosResult(seed, schedule(seed, faults, kinds))
    config = prepared(config)
    print(f"seed {seed}: {faults} faults, run in {config.run_dir}", flush=True)
    scene = Scene()
    began = time.monotonic()
    with Cluster(config, servers) as cluster, contextlib.ExitStack() as looking:
        try:
            begin(cluster)
            witness = looking.enter_context(Witness(cluster)) if config.rollout.engine == "vllm" else None
            _inject_all(cluster, scene, result, began)
            result.violations += end(cluster, scene, calm_s)
            result.counts = asdict(count_folder(cluster.folder))
            looking.close()
            if witness is not None:
                _hear(witness, config, scene, result)
        except (RunEnded, TimeoutError, redis.exceptions.RedisError) as error:
            result.violations.append(Violation("the run goes on", "", str(error)))
    for fault in result.faults:
        if not fault.alone:
            fault.survived = fault.injected and not result.violations
    result.wall_s = time.monotonic() - began
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / CHAOS, asdict(result))
    return result


def _hear(witness: Witness, config: Config, scene: Scene, result: ChaosResult) -> None:
    """What a witness of the run has to say of its chunks; weights are kept where something is wrong with them."""
    violations, looked_at = check_written(witness.seen, config.student.model, frozenset(scene.poisoned))
    if witness.failed is not None:
        violations.append(Violation("the harness works", "", f"witness: {brief(witness.failed)}"))
    result.violations += violations
    nats = [one.nats for one in looked_at]
    result.counts |= {"chunks_compared": len(nats), "worst_nats": max(nats, default=0.0)}
    if not violations:
        witness.remove_copies()


def prepared(config: Config) -> Config:
    """The config with what the harness needs; a former run of its name is moved aside.

    Raises ConfigError and ModelError for one that it cannot work with. From here on SIGTERM ends the harness as Ctrl-C
    does: with everything that it started.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if config.redis.url is not None:
        raise ConfigError(
            "redis.url: the harness stops, fills and kills its Redis, so it brings its own; leave it unset"
        )
    if config.checkpoints.keep < 3:
        raise ConfigError("checkpoints.keep: torn checkpoints need at least 3, so that one before them is left")
    tree = config.model_dump()
    tree["feeder"] |= {"record_traces": True, "record_audit": True}
    tree["learner"] |= {"max_steps": _NEVER}
    config = Config.model_validate(tree)
    for problem in check(config).problems:
        raise ConfigError(problem)
    if config.run_dir.exists():
        move_aside(config.run_dir)
    return config


def begin(cluster: Cluster) -> None:
    """Wait until the run has taken its first steps. Raises RunEnded, TimeoutError."""
    limit = cluster.patience(_START_S)
    deadline = time.monotonic() + limit
    while not (cluster.folder / RUN).exists() or cluster.steps() < 3:
        cluster.check_alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run took no three steps within {limit:.0f} s: {cluster.last_words()}")
        time.sleep(0.2)


# --- faults -------------------------------------------------------------------------------------------------------


def _inject_all(cluster: Cluster, scene: Scene, result: ChaosResult, began: float) -> None:
    threads: list[threading.Thread] = []
    ended: list[BaseException] = []
    rng = random.Random(result.seed + 1)

    def strike(fault: Fault) -> None:
        try:
            _inject(cluster, scene, fault, result, began)
        except RunEnded as error:
            ended.append(error)
        except Exception as error:
            what = f"{fault.kind}: {type(error).__name__}: {error}"
            result.violations.append(Violation("the harness works", "", what))

    for number, fault in enumerate(result.faults, start=1):
        if ended:
            break
        if fault.alone:
            strike(fault)
            _print_progress(number, fault, result)
            continue
        _pause(cluster, threads, min(rng.expovariate(1 / _GAP_S), 4 * _GAP_S))
        threads.append(threading.Thread(target=strike, args=(fault,), daemon=True))
        threads[-1].start()
        _print_progress(number, fault, result)
    cluster.serve(lambda: not _alive(threads))
    if ended:
        raise ended[0]


def _pause(cluster: Cluster, threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for so long, and until one more fault may be under way."""
    until = time.monotonic() + seconds
    cluster.serve(lambda: time.monotonic() >= until and _alive(threads) < _AT_ONCE)


def _alive(threads: Sequence[threading.Thread]) -> int:
    return sum(thread.is_alive() for thread in threads)


def _inject(cluster: Cluster, scene: Scene, fault: Fault, result: ChaosResult, began: float) -> None:
    """Inject one fault; alone: into a whole run, and wait until it has recovered. Raises RunEnded."""
    kind = KINDS[fault.kind]
    for attempt in range(_TRIES):
        try:
            if fault.alone:
                wait_whole(cluster)
            _strike(cluster, scene, fault, kind, began, random.Random(fault.seed + attempt))
            fault.survived = True
            return
        except Missed as miss:
            fault.note = f"missed: {miss}"
        except _OTHERS_FIRST as error:
            fault.note = f"missed: {error}"  # another fault was there first
        except TimeoutError as error:
            fault.note = str(error)
            result.violations.append(Violation("every fault is recovered from", "", f"{fault.kind}: {error}"))
            return
        time.sleep(1.0)


def _strike(cluster: Cluster, scene: Scene, fault: Fault, kind: Kind, began: float, rng: random.Random) -> None:
    # Before the clock starts: this wait for the supervisor's restart limit is not part of the recovery.
    for role, times in kind.restarts.items():
        cluster.spend_restart(role, times)
    pid = cluster.victim(kind.role, rng) if kind.role else 0
    if not fault.alone:
        fault.at_s = time.monotonic() - began
        fault.note = kind.inject(cluster, rng, scene, pid)
        fault.injected = True
        return
    holder = holder_of(cluster, kind.role)
    replaced = (kind.role, holder) if kind.role and holder and kind.ends_process else None
    stop = kind.role if kind.others_take_over else None
    struck, held = stop_holding(cluster, stop, pid) if stop else (time.monotonic(), Held())
    fault.at_s = struck - began
    try:
        # The takeover happens while the victim is still stopped. A fault of all processes must be over first; recovery
        # is measured from the state then, which is empty after a loss of Redis.
        before = cluster.stage() if stop else None
        with ThreadPoolExecutor(1) as pool:
            injecting = pool.submit(kind.inject, cluster, rng, scene, pid)
            if not stop:
                cluster.serve(injecting.done)
                injecting.result()
            recovery_s = wait_recovered(
                cluster, before, held, struck, kind.moves, replaced, lambda: injecting.done() and injecting.result()
            )
            fault.note = injecting.result()
    finally:
        if stop:
            continue_process(pid)
    fault.recovery_s, fault.injected = recovery_s, True


def _print_progress(number: int, fault: Fault, result: ChaosResult) -> None:
    recovery = f"recovered in {fault.recovery_s:.1f} s" if fault.recovery_s is not None else ""
    how = "alone" if fault.alone else "overlapping"
    print(f"[{number:>4} of {len(result.faults)}] {fault.kind:22} {how:12} {recovery}  {fault.note}", flush=True)


# --- the end ------------------------------------------------------------------------------------------------------


def end(cluster: Cluster, scene: Scene, calm_s: float) -> list[Violation]:
    """Calm, Ctrl-C, `--resume` with a few steps more, to the end; then what the checker finds. Raises RunEnded.

    A run in which a rollout does not end cannot end itself either: that is reported, with the state of its folder,
    and it is not resumed.
    """
    cursor, waiting = _calm(cluster, calm_s)
    allowed = Allowed(
        poisoned=frozenset(scene.poisoned),
        lost=frozenset(scene.lost),
        rolled_back=frozenset(scene.rolled_back),
        calm_cursor=cursor,
        broken_notices=scene.broken_notices,
    )
    if waiting:
        with contextlib.suppress(RunEnded):
            cluster.stop()
        still = [Violation("ended_once", rid, f"still open after {calm_s:g} s of calm") for rid in sorted(waiting)]
        return still + check_folder(cluster.folder, allowed)
    code = cluster.stop()
    if code != 130:
        raise RunEnded(f"interrupted, katana run ended with {code}: {cluster.last_words()}")
    cluster.launch("--resume", overrides={"learner.max_steps": cluster.steps() + 4})
    if code := cluster.wait(cluster.patience(_END_S)):
        raise RunEnded(f"resumed, katana run ended with {code}: {cluster.last_words()}")
    clients = [part.client for part in cluster.plane.parts]
    return check_folder(cluster.folder, allowed) + check_redis(clients, cluster.run_key, cluster.folder, allowed)


def _calm(cluster: Cluster, calm_s: float) -> tuple[int, set[str]]:
    """Wait for the rollouts open when the faults ended; returns the number admitted by then, and those still open."""
    wait_whole(cluster)
    cursor = cluster.cursor()
    waiting, deadline = cluster.open_rollouts(), time.monotonic() + calm_s
    while waiting and time.monotonic() < deadline:
        cluster.check_alive()
        time.sleep(0.2)
        waiting &= cluster.open_rollouts()
    return cursor, waiting


def run_chaos(
    config: Config, *, seeds: Sequence[int], faults: int, kinds: Sequence[str], calm_s: float, servers: int
) -> int:
    """`katana chaos`: a run for each seed, a table over all. `kinds`: none: all. Returns the exit code."""
    kinds = kinds or kinds_for(config, servers)
    for kind in kinds:
        if kind in KINDS and (lacking := KINDS[kind].lacks(config, servers)):
            raise ConfigError(f"--kinds: {kind} needs {lacking}")
    results = []
    for seed in seeds:
        named = config.model_copy(update={"name": f"{config.name}-{seed}"})
        results.append(chaos(named, seed=seed, faults=faults, kinds=kinds, calm_s=calm_s, servers=servers))
    print(describe(results))
    for result in results:
        for one in result.violations[:50]:
            print(f"violation (seed {result.seed}): {one.statement}: {one.rid} {one.detail}", file=sys.stderr)
    return 0 if all(result.passed for result in results) else 1
