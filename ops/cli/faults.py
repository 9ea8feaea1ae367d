"""Commands that load the system: speed benchmarks, injected faults, a long run with kills."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError
from ops.cli.arguments import (
    Commands,
    add_config,
    add_overrides,
    chance,
    command,
    load_config,
    positive,
    positive_float,
)

SHAPE = {"vocab_size": 151_936, "hidden_size": 1024, "tokens": 8192, "compared_tokens": 1024}
"""What `bench pieces` measures, unless told otherwise."""


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    bench = command(commands, "bench", _bench, "measure speed; JSON on standard output")
    bench.add_argument(
        "what",
        choices=(
            *("engine", "score", "head", "loop", "idle", "bus", "arbiter", "learner", "pieces", "start"),
            "time-to-accuracy",
        ),
        help="engine: decode tokens/s against a bare forward loop; "
        "score: tokens/s of a teacher, and what it forwards again, by rollouts in flight; "
        "head: seconds of a bfloat16 head with a bfloat16 and with a float32 result; "
        "loop: tokens/s of a whole run and each role's busy share; idle: the load of workers without work; "
        "bus: chunks/s and latency through the real roles, with recorded payloads for models; "
        "arbiter: tokens/s of the arbiter alone, and of its policy; learner: tokens/s and memory of a learner's step; "
        "pieces: memory and seconds of the learner's head and loss beside whole logits, memory of a teacher's scores; "
        "start: seconds from `katana run` to its first step; "
        "time-to-accuracy: seconds of training until held-out avg@k reaches --target",
    )
    bench.add_argument("config", type=Path, nargs="?", default=Path("ops/experiments/demo.yaml"))
    add_overrides(bench)
    bench.set_defaults(of_a_run=False, judges=False, name=None)
    bench.add_argument("--repeats", type=positive, default=5)
    bench.add_argument("--workers", type=positive, default=1000, help="idle workers, for idle (default 1000)")
    bench.add_argument(
        "--rate",
        type=positive_float,
        metavar="R",
        help="for bus: chunks a second that are offered (default: as fast as it goes)",
    )
    for option, default in SHAPE.items():
        what = option.replace("_", " ")
        bench.add_argument(
            f"--{option.replace('_', '-')}", type=positive, help=f"{what}, for pieces (default {default:,})"
        )
    bench.add_argument("--target", type=chance, metavar="AVG", help="avg@k to reach, for time-to-accuracy")

    chaos = command(commands, "chaos", _chaos, "start a run, inject faults, then check that nothing was lost")
    add_config(chaos, judges=True)
    chaos.add_argument(
        "--seed",
        type=int,
        action="append",
        help="seed of the fault schedule; may be repeated: a run for each (default 0)",
    )
    chaos.add_argument("--faults", type=positive, default=130, help="number of faults in each run (default 130)")
    chaos.add_argument(
        "--kinds", help="comma-separated names (default: all for so many servers); an unknown name lists them"
    )
    chaos.add_argument("--servers", type=positive, default=1, help="number of data servers (default 1)")
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
    if arguments.rate is not None and arguments.what != "bus":
        raise ConfigError(f"--rate is for bench bus alone; bench {arguments.what} has no rate to set")
    shape: Any = {option: getattr(arguments, option) or default for option, default in SHAPE.items()}
    if arguments.what != "pieces" and any(getattr(arguments, option) for option in SHAPE):
        names = ", ".join(f"--{option.replace('_', '-')}" for option in SHAPE)
        raise ConfigError(f"{names} are for bench pieces alone, not for bench {arguments.what}")
    from ops.bench import accuracy, arbiter, bus, idle, learner, pieces, score, speed, start

    if (arguments.target is not None) != (arguments.what == "time-to-accuracy"):
        raise ConfigError(f"bench {arguments.what}: --target AVG, from 0 to 1, is for time-to-accuracy, which needs it")
    measure: dict[str, Callable[[Config, int], dict[str, Any]]] = {
        "engine": speed.engine,
        "score": score.score,
        "head": speed.head,
        "loop": speed.loop,
        "arbiter": arbiter.arbiter,
        "learner": learner.learner,
        "pieces": partial(pieces.pieces, **shape),
        "bus": partial(bus.bus, rate=arguments.rate),
        "idle": partial(idle.idle, workers=arguments.workers),
        "time-to-accuracy": partial(accuracy.time_to_accuracy, target=arguments.target),
        "start": start.first_step,
    }
    print(json.dumps(measure[arguments.what](load_config(arguments), arguments.repeats), indent=2))
    return 0


def _chaos(arguments: argparse.Namespace) -> int:
    from ops.chaos.harness import run_chaos

    return run_chaos(
        load_config(arguments),
        seeds=arguments.seed or [0],
        faults=arguments.faults,
        kinds=[kind.strip() for kind in arguments.kinds.split(",")] if arguments.kinds else [],
        calm_s=arguments.calm,
        servers=arguments.servers,
    )


def _soak(arguments: argparse.Namespace) -> int:
    from ops.chaos.soak import soak

    return soak(load_config(arguments), minutes=arguments.minutes, seed=arguments.seed)
