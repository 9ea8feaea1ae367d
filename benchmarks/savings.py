"""What termination saves in wall-clock time, how far rollouts overshoot, and what control arm and records cost.

    .venv/bin/python benchmarks/savings.py --out savings.json
    .venv/bin/python benchmarks/savings.py --out savings.json --only cost --repeats 5 --steps 60
    .venv/bin/python benchmarks/savings.py --out savings.json --only saving --pair made --steps 12

Whole runs without evaluation, in turn within every repeat: of the demo, or of the random pair of made_pair.py, whose
tokens cost arithmetic. All figures are read from their folders, in runs/savings. README.md in this folder says what is
compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import in_words, markdown
from made_pair import make_pair
from sides import ROOT, SideFailed, exit_code, run_katana

from common.config import Config, load
from common.files import write_json
from common.runfiles.records import BookLine, Step
from common.runfiles.run import RunFolder
from ops.bench.speed import machine, spread
from ops.cli.arguments import positive

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"termination.policy": "none"},
    "kat": {"termination.policy": "kat"},
    "no control arm": {"termination.control_fraction": 0.0, "termination.calibrate_on": "all"},
    "no traces of rollouts": {"feeder.record_traces": False},
    "neither": {
        "termination.control_fraction": 0.0,
        "termination.calibrate_on": "all",
        "feeder.record_traces": False,
    },
}
"""By name: what differs from the config as it is. All but `none` run `kat`: the demo's config does."""

PARTS = {"saving": ("none", "kat"), "cost": ("kat", "no control arm", "no traces of rollouts", "neither")}
"""By part: the runs that it needs. The overshoot is that of `kat`, in either."""


class NeverActive(SideFailed):
    """The policy was never in force, or only in the last step: there is nothing to compare."""


# --- from a run's folder ---------------------------------------------------------------------------------------------


def active_from(run: RunFolder) -> int:
    """The first step that ended after a rollout whose cut was possible had its verdict. Raises NeverActive."""
    began = min((one.verdict_unix_s for one in run.rollouts() if one.active and one.verdict_unix_s), default=None)
    steps = [step.step for step in run.steps() if began is not None and step.unix_s >= began]
    if len(steps) < 2:
        raise NeverActive(f"{run.path}: termination was active in {len(steps)} steps; expected more --steps")
    return steps[0]


def since(run: RunFolder, step: int) -> dict[str, float]:
    """Seconds, tokens generated and trained on, and steps, from the end of `step` to the end of the last one."""
    steps: list[Step] = list(run.steps())
    first, last = next(one for one in steps if one.step == step), steps[-1]
    seconds = last.unix_s - first.unix_s
    generated = (last.tokens_generated or 0) - (first.tokens_generated or 0)
    return {
        "seconds": seconds,
        "tokens_generated": generated,
        "tokens_trained": last.tokens_trained_total - first.tokens_trained_total,
        "steps_per_s": (last.step - first.step) / seconds,
        "generated_tokens_per_s": generated / seconds,
    }


def overshoot(run: RunFolder, chunk_tokens: int) -> dict[str, float]:
    """Tokens that stopped rollouts wrote after the token at which the policy fired. Raises NeverActive."""
    tokens = [one.tokens_overshoot for one in run.rollouts() if one.stopped and one.arm == "treated"]
    if not tokens:
        raise NeverActive(f"{run.path}: no rollout was stopped; expected more --steps")
    p50, p95, p99 = (float(value) for value in np.percentile(tokens, (50, 95, 99)))
    return {
        "stopped": len(tokens),
        "tokens_p50": p50,
        "tokens_p95": p95,
        "tokens_p99": p99,
        "chunks_p50": p50 / chunk_tokens,
        "chunks_p95": p95 / chunk_tokens,
    }


def control_share(run: RunFolder) -> float:
    """Tokens that the control arm wrote beyond as many treated rollouts, as a share of all, while the policy could cut.

    This is what the control arm costs in tokens at this threshold, from the books of the run itself.
    """
    lines: list[BookLine] = [one for one in run.rollouts() if one.compared]
    lengths = {arm: [one.tokens_generated for one in lines if one.arm == arm] for arm in ("treated", "control")}
    if not all(lengths.values()):
        raise NeverActive(f"{run.path}: an arm has no rollout that could be cut; expected more --steps")
    written = sum(map(sum, lengths.values()))
    treated = sum(lengths["treated"]) / len(lengths["treated"])
    return (sum(lengths["control"]) - len(lengths["control"]) * treated) / written


def compared(folders: dict[str, Path], chunk_tokens: int) -> dict[str, Any]:
    """All figures of a repeat, by run, from the step on at which termination became active in `kat`."""
    runs = {name: RunFolder(folder) for name, folder in folders.items()}
    step = active_from(runs["kat"])
    found: dict[str, Any] = {"active_from_step": step, "runs": {name: since(run, step) for name, run in runs.items()}}
    found["overshoot"] = overshoot(runs["kat"], chunk_tokens)
    found["control_share_of_tokens"] = control_share(runs["kat"])
    speeds = {name: one["steps_per_s"] for name, one in found["runs"].items()}
    found["cost"] = {name: 1 - speeds["kat"] / speed for name, speed in speeds.items() if name not in ("kat", "none")}
    if "none" in runs:
        found["saved"] = _saved(found["runs"]["none"], found["runs"]["kat"])
    return found


def _saved(none: dict[str, float], kat: dict[str, float]) -> dict[str, float]:
    tokens = 1 - kat["tokens_generated"] / none["tokens_generated"]
    seconds = 1 - kat["seconds"] / none["seconds"]
    return {"tokens": tokens, "seconds": seconds, "seconds_per_token_saved": seconds / tokens}


# --- tables ----------------------------------------------------------------------------------------------------------


def table(repeats: Sequence[dict[str, Any]]) -> str:
    """Markdown tables of medians and ranges over the repeats."""
    texts = [_runs_table(repeats)]
    rows = []
    if "saved" in repeats[0]:
        saved = {name: [one["saved"][name] for one in repeats] for name in repeats[0]["saved"]}
        rows += [
            ["tokens that `kat` did not generate, share of those of `none`", percent(saved["tokens"])],
            ["seconds that `kat` did not take, share of those of `none`", percent(saved["seconds"])],
            ["share of seconds / share of tokens", in_words(saved["seconds_per_token_saved"])],
        ]
    over = {name: [one["overshoot"][name] for one in repeats] for name in repeats[0]["overshoot"]}
    rows += [
        ["stopped rollouts of a run", in_words(over["stopped"])],
        ["tokens written after the policy fired, p50", in_words(over["tokens_p50"])],
        ["the same, p95", in_words(over["tokens_p95"])],
        ["in chunks, p50", in_words(over["chunks_p50"])],
        ["in chunks, p95", in_words(over["chunks_p95"])],
        [
            "tokens that the control arm wrote beyond as many treated rollouts, share of all",
            percent([one["control_share_of_tokens"] for one in repeats]),
        ],
    ]
    rows += [
        [f"steps/s that the config as it is costs against `{name}`", percent([one["cost"][name] for one in repeats])]
        for name in repeats[0]["cost"]
    ]
    texts.append(markdown(["", "median (range)"], rows))
    texts.append(_what_was_switched([*repeats[0]["runs"]]))
    return "\n\n".join(texts)


def _runs_table(repeats: Sequence[dict[str, Any]]) -> str:
    names = {"steps_per_s": "steps/s", "generated_tokens_per_s": "tokens generated/s"}
    rows = [
        [run, *(in_words([one["runs"][run][name] for one in repeats]) for name in names)] for run in repeats[0]["runs"]
    ]
    active = in_words([float(one["active_from_step"]) for one in repeats])
    return f"{markdown(['run', *names.values()], rows)}\n\nFrom the step on at which termination was active: {active}."


def _what_was_switched(names: Sequence[str]) -> str:
    lines = [
        f"- `{name}`: {', '.join(f'{key}: {_yaml(value)}' for key, value in VARIANTS[name].items())}"
        for name in names
        if VARIANTS[name]
    ]
    if "no control arm" in names:
        lines += [
            "- Without a control arm the rule is calibrated on all rollouts, which moves its threshold: compare the "
            "tokens generated, and the share from the books, which is at the same threshold.",
            "- Every process serves metrics and the learner writes metrics.jsonl: no key switches that off, so it is "
            "in every row. feeder.record_audit and trace are off as the config is.",
        ]
    return "\n".join(["What was switched:", *lines])


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def percent(values: Sequence[float]) -> str:
    found = spread([*values])
    return f"{found['median']:.1%} ({found['min']:.1%} to {found['max']:.1%})"


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 for arguments that do not fit together. `runs`: the names of those to make, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all figures")
    parser.add_argument("--only", help=f"parts, comma-separated (default: all): {', '.join(PARTS)}")
    parser.add_argument(
        "--pair", choices=("shipped", "made"), default="shipped", help="the demo, or the random pair of made_pair.py"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind, in turn (default 3)")
    parser.add_argument("--steps", type=positive, default=40, help="optimizer steps of a run (default 40)")
    parser.add_argument("--work", type=Path, default=Path("runs/savings"), help="folder for the runs and their logs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="a key of the demo's config"
    )
    arguments = parser.parse_args(words)
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: expected a file in a folder that is there")
    parts = arguments.only.split(",") if arguments.only is not None else [*PARTS]
    if wrong := [name for name in parts if name not in PARTS]:
        parser.error(f"--only: {wrong[0]!r:.40} is not a part; allowed: {', '.join(PARTS)}")
    arguments.runs = [name for name in VARIANTS if any(name in PARTS[part] for part in parts)]
    arguments.work = arguments.work.resolve()
    arguments.config = ROOT / "ops/experiments/demo.yaml"
    return arguments


def config_of(arguments: argparse.Namespace, variant: str, repeat: int) -> Config:
    """The config of the pair with a run's own changes; a seed for each repeat, the same for all of its runs. Raises
    ConfigError."""
    sets = {
        "name": f"{variant.replace(' ', '-')}-{repeat}",
        "runs_dir": arguments.work,
        "learner.max_steps": arguments.steps,
        "eval.every_steps": 0,
        "seed": repeat,
        **VARIANTS["kat"],
        **VARIANTS[variant],
    }
    return load(arguments.config, [*arguments.overrides, *(f"{key}={one}" for key, one in sets.items())])


def measure_all(arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All repeats; `keep` gets those that are done after each. Raises ConfigError, ModelError, SideFailed,
    NeverActive."""
    repeats: list[dict[str, Any]] = []
    for repeat in range(1, arguments.repeats + 1):
        configs = {name: config_of(arguments, name, repeat) for name in arguments.runs}
        for config in configs.values():
            run_katana(config)
        folders = {name: config.run_dir for name, config in configs.items()}
        repeats.append(compared(folders, configs["kat"].rollout.chunk_tokens))
        keep(repeats)
        print(f"repeat {repeat} of {arguments.repeats} is done", file=sys.stderr, flush=True)
    return repeats


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    facts = {
        "what": "savings and costs of termination",
        "arguments": {
            "pair": arguments.pair,
            "steps": arguments.steps,
            "runs": arguments.runs,
            "set": arguments.overrides,
        },
        "machine": machine(),
    }

    def measure() -> str:
        if arguments.pair == "made":
            arguments.config = make_pair(arguments.work / "made-pair")
        for name in arguments.runs:
            config_of(arguments, name, 1)  # before any run begins
        return table(measure_all(arguments, lambda done: write_json(arguments.out, facts | {"repeats": done})))

    return exit_code(measure, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
