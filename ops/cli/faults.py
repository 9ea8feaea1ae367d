"""Commands that load the system: speed benchmarks, injected faults, a long run with kills."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.config import Config
from ops.cli.arguments import Commands, add_config, add_overrides, command, load_config, positive, positive_float


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    bench = command(commands, "bench", _bench, "measure speed; JSON on standard output")
    bench.add_argument(
        "what",
        choices=("engine", "score", "head", "loop", "idle"),
        help="engine: decode tokens/s against a bare forward loop; "
        "score: tokens/s of a teacher, and what it forwards again, by rollouts in flight; "
        "head: seconds of a bfloat16 head with a bfloat16 and with a float32 result; "
        "loop: tokens/s of a whole run and each role's busy share; idle: the load of workers without work",
    )
    bench.add_argument("config", type=Path, nargs="?", default=Path("ops/experiments/demo.yaml"))
    add_overrides(bench)
    bench.set_defaults(of_a_run=False, judges=False, name=None)
    bench.add_argument("--repeats", type=positive, default=5)
    bench.add_argument("--workers", type=positive, default=1000, help="idle workers, for idle (default 1000)")

    chaos = command(commands, "chaos", _chaos, "start a run, inject faults, then check that nothing was lost")
    add_config(chaos, judges=True)
    chaos.add_argument(
        "--seed",
        type=int,
        action="append",
        help="seed of the fault schedule; may be repeated: a run for each (default 0)",
    )
    chaos.add_argument("--faults", type=positive, default=130, help="number of faults in each run (default 130)")
    chaos.add_argument("--kinds", help="comma-separated names (default: all); an unknown name lists them")
    chaos.add_argument(
        "--calm",
        type=positive_float,
        default=120.0,
        metavar="SECONDS",
        help="how long open rollouts may take after the last fault (default 120)",
    )

    soak = command(commands, "soak", _soak, "a long run with occasional kills; checks that memory stays flat")
    add_config(soak, judges=True)
    soak.add_argument("--minutes", type=positive_float, default=30.0, help="duration (default 30)")
    soak.add_argument("--seed", type=int, default=0, help="seed of the kills (default 0)")


def _bench(arguments: argparse.Namespace) -> int:
    from ops.bench import idle, score, speed

    measure: dict[str, Callable[[Config, int], dict[str, Any]]] = {
        "engine": speed.engine,
        "score": score.score,
        "head": speed.head,
        "loop": speed.loop,
        "idle": partial(idle.idle, workers=arguments.workers),
    }
    print(json.dumps(measure[arguments.what](load_config(arguments), arguments.repeats), indent=2))
    return 0


def _chaos(arguments: argparse.Namespace) -> int:
    from ops.chaos.faults import KINDS
    from ops.chaos.harness import run_chaos

    kinds = [kind.strip() for kind in arguments.kinds.split(",")] if arguments.kinds else list(KINDS)
    seeds = arguments.seed or [0]
    return run_chaos(load_config(arguments), seeds=seeds, faults=arguments.faults, kinds=kinds, calm_s=arguments.calm)


def _soak(arguments: argparse.Namespace) -> int:
    from ops.chaos.soak import soak

    return soak(load_config(arguments), minutes=arguments.minutes, seed=arguments.seed)
