"""Katana and TRL's DistillationTrainer on the same student, teacher, prompts and settings, alternately on this machine.

    .venv/bin/python benchmarks/against_trl.py --repeats 5 --out speed.json
    .venv/bin/python benchmarks/against_trl.py --repeats 5 --pair made --steps 8 --out made.json
    .venv/bin/python benchmarks/against_trl.py --repeats 5 --time-to-accuracy --out accuracy.json

Nothing else should run meanwhile. README.md in this folder: what is measured, what differs, how long it takes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy_race
from comparison import summarize, table
from made_pair import make_pair
from sides import ROOT, Course, exit_code, run_katana, run_trl
from trl_venv import python_of

from common.config import Config, load
from common.files import write_json
from common.policy_names import BUILT_IN
from ops.bench.speed import machine
from ops.cli.arguments import positive

CALM_LOAD = 0.5  # load average above which something else is running
STEPS = {"shipped": 40, "made": 8}
RACE_STEPS = 50
OPTION_OF = {
    "learner.max_steps": "--katana-steps",
    "checkpoints.every_steps": "--every",
    "termination.policy": "--policy",
    "eval.problems": "--problems",
}
"""Settings of Katana's side that have an option of their own."""


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 for arguments that do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=positive, default=5, help="runs of each side, alternately (default 5)")
    parser.add_argument(
        "--pair",
        choices=("shipped", "made"),
        default="shipped",
        help="the shipped student and teacher on arithmetic, or a larger random pair (made_pair.py)",
    )
    parser.add_argument("--policy", choices=BUILT_IN, help="Katana's termination (default none; kat in the race)")
    parser.add_argument(
        "--steps", type=positive, help=f"optimizer steps of a run (default {STEPS}, {RACE_STEPS} in the race)"
    )
    parser.add_argument("--batch-size", type=positive, help="trajectories of a step, both sides (default the config's)")
    parser.add_argument(
        "--warmup",
        type=positive,
        help="first steps that are left out of the time of a step (default a quarter, at most 10)",
    )
    parser.add_argument(
        "--threads", type=positive, default=os.cpu_count(), help="TRL's torch threads (default: all cores)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/against-trl"), help="folder for runs, logs and models")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all figures")
    race = parser.add_argument_group("time to accuracy")
    race.add_argument(
        "--time-to-accuracy", action="store_true", help="until Katana reaches the avg@4 of TRL after --steps"
    )
    race.add_argument("--katana-steps", type=positive, help="steps of Katana's run (default twice TRL's)")
    race.add_argument("--every", type=positive, help="Katana's steps between two evaluated checkpoints (default 5)")
    race.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of Katana's side alone, such as learner.batch_size=8 (may be repeated)",
    )
    race.add_argument("--problems", type=positive, help="held-out problems, 4 samples each (default 192)")
    arguments = parser.parse_args(words)
    if wrong := _misfit(arguments):
        parser.error(wrong)
    _fill_in(arguments)
    if arguments.warmup >= arguments.steps:
        parser.error(f"--warmup {arguments.warmup}: expected fewer than --steps, {arguments.steps}")
    return arguments


def _misfit(given: argparse.Namespace) -> str | None:
    if given.time_to_accuracy and given.pair == "made":
        return "--time-to-accuracy: the made pair learns nothing; expected --pair shipped"
    if given.time_to_accuracy and given.warmup is not None:
        return "--warmup is for the time of a step; the race counts from the first step on"
    for name in ("katana_steps", "every", "set", "problems"):
        if not given.time_to_accuracy and getattr(given, name):
            return f"--{name.replace('_', '-')} is for --time-to-accuracy"
    for key in (one.partition("=")[0].strip() for one in given.set):
        if key in OPTION_OF:
            return f"--set {key}: expected {OPTION_OF[key]}"
    if given.out.is_dir() or not given.out.absolute().parent.is_dir():
        return f"--out {given.out}: expected a file in a folder that is there"
    return None


def _fill_in(given: argparse.Namespace) -> None:
    given.steps = given.steps or (RACE_STEPS if given.time_to_accuracy else STEPS[given.pair])
    given.policy = given.policy or ("kat" if given.time_to_accuracy else "none")
    given.warmup = given.warmup or max(1, min(10, given.steps // 4))
    given.katana_steps = given.katana_steps or 2 * given.steps
    given.every = given.every or 5
    given.problems = given.problems or 192
    given.work = given.work.resolve()


def config_of(arguments: argparse.Namespace) -> Config:
    """The config of both sides. Raises ConfigError."""
    made = arguments.pair == "made"
    file = make_pair(arguments.work / "made-pair") if made else ROOT / "ops/experiments/demo.yaml"
    sets = {
        "runs_dir": arguments.work,
        "learner.max_steps": arguments.steps,
        "termination.policy": arguments.policy,
        "eval.every_steps": 0,
        "eval.problems": arguments.problems,
        "eval.k": 4,
    }
    if arguments.batch_size is not None:
        sets["learner.batch_size"] = arguments.batch_size
    return load(file, [f"{key}={value}" for key, value in sets.items()])


def renamed(config: Config, name: str, **changes: Any) -> Config:
    return Config.model_validate(config.model_dump() | {"name": name} | changes)


def speed(arguments: argparse.Namespace, python: Path, keep: Callable[[dict[str, Any]], None]) -> str:
    """Alternate runs; `keep` gets all figures so far after each pair. Returns a table."""
    config = config_of(arguments)
    repeats: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for number in range(1, arguments.repeats + 1):
        load_before = os.getloadavg()[0]
        theirs = run_trl(python, renamed(config, f"trl-{number}"), threads=arguments.threads)
        ours = run_katana(renamed(config, f"katana-{number}"))
        repeats.append(
            {side: one.to_json(arguments.warmup) for side, one in (("trl", theirs), ("katana", ours))}
            | {"load_before": load_before}
        )
        summary = summarize(repeats)
        keep({"summary": summary, "repeats": repeats, "versions": versions_of(theirs, ours)})
        print(
            f"repeat {number}: TRL {_seconds(repeats[-1], 'trl')}, Katana {_seconds(repeats[-1], 'katana')}", flush=True
        )
    return table(summary)


def _seconds(repeat: dict[str, Any], side: str) -> str:
    return f"{repeat[side]['seconds_a_step']:.3f} s a step"


def race(arguments: argparse.Namespace, python: Path, keep: Callable[[dict[str, Any]], None]) -> str:
    """As `speed`, for the time to accuracy."""
    config, repeats = config_of(arguments), []
    katana = accuracy_race.katana_s(config, steps=arguments.katana_steps, every=arguments.every, settings=arguments.set)
    judge = accuracy_race.Judge(config)
    for number in range(1, arguments.repeats + 1):
        load_before = os.getloadavg()[0]
        seed = {"seed": config.seed + number - 1}
        model = arguments.work / f"trl-{number}-model"
        theirs = run_trl(python, renamed(config, f"trl-{number}", **seed), threads=arguments.threads, save=model)
        goal = judge.of_model(model)
        ours_config = renamed(katana, f"katana-{number}", **seed)
        ours = run_katana(ours_config)
        looks = judge.looks(ours_config.run_dir, goal.avg_at_k)
        repeats.append(accuracy_race.outcome(theirs, goal, ours, looks) | {"load_before": load_before})
        keep({"repeats": repeats, "versions": versions_of(theirs, ours)})
        print(f"repeat {number}: {accuracy_race.sentence(repeats[-1])}", flush=True)
    return accuracy_race.table(repeats)


def versions_of(theirs: Course, ours: Course) -> dict[str, dict[str, str]]:
    return {"trl": theirs.versions, "katana": ours.versions}


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if os.getloadavg()[0] > CALM_LOAD:
        print(f"warning: load average {os.getloadavg()[0]:.1f}: is something else running?", file=sys.stderr)
    facts = {
        "what": "time to accuracy" if arguments.time_to_accuracy else "seconds a step",
        "arguments": {name: value for name, value in vars(arguments).items() if name not in ("work", "out")},
        "machine": machine() | {"system": platform.platform()},
    }
    measure = race if arguments.time_to_accuracy else speed

    def keep(found: dict[str, Any]) -> None:
        write_json(arguments.out, facts | found)

    return exit_code(lambda: measure(arguments, python_of(), keep), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
