"""Seconds of training until held-out avg@k reaches a target; evaluated after the run, outside the clock."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import Config, ConfigError
from common.runfiles.names import CHECKPOINTS
from common.runfiles.records import Scores
from common.runfiles.run import RunFolder
from learner.checkpoint import load
from learner.lora import weights_in
from ops.bench.speed import machine, run_quietly, spread
from ops.run.evaluator import Evaluator


@dataclass(frozen=True, slots=True)
class Looked:
    """A checkpoint that was evaluated: its step, avg@k, and seconds from the end of the run's first step to its own."""

    step: int
    avg_at_k: float
    standard_error_at_most: float
    since_first_step_s: float


def to_be_evaluated(config: Config) -> Config:
    """The config of a run whose checkpoints are all kept, and which evaluates nothing itself.

    Raises ConfigError for a data set without benchmarks, which has nothing to evaluate on.
    """
    if config.data.task == "dataset" and not config.eval.data:
        raise ConfigError("eval.data: names no benchmark; the task dataset has no held-out rows")
    tree = config.model_dump()
    tree["eval"] |= {"every_steps": 0, "engine": "slots"}
    tree["checkpoints"] |= {"keep": config.learner.max_steps}
    return Config.model_validate(tree)


def looks_until(evaluator: Evaluator, folder: Path, target: float) -> list[Looked]:
    """Evaluate the checkpoints of a finished run, oldest first, to the first that reaches `target`, or all.

    The last of what is returned reached the target, or none did.
    """
    ends = {step.step: step.unix_s for step in RunFolder(folder).steps()}
    first, looks = min(ends.values()), []
    for path in sorted((folder / CHECKPOINTS).glob("step-*[0-9]")):
        state = load(path)
        evaluator.writer.swap(weights_in(state))
        scores = evaluator.measure()
        assert scores is not None
        seconds = ends[state.step] - first
        looks.append(Looked(state.step, scores.avg_at_k, standard_error_at_most(scores), seconds))
        if scores.avg_at_k >= target:
            break
    return looks


def standard_error_at_most(scores: Scores) -> float:
    """Of avg@k, over problems: as if the k samples of a problem were always all right or all wrong."""
    return math.sqrt(scores.avg_at_k * (1 - scores.avg_at_k) / scores.n)


def time_to_accuracy(config: Config, repeats: int, *, target: float) -> dict[str, Any]:
    """Runs with the seeds from `config.seed` on, all evaluated on the held-out problems of `config.seed`.

    Evaluated are the checkpoints (`checkpoints.every_steps`), so a time is that of the first checkpoint that reached
    the target: with noise in avg@k, sooner than the true one by chance. Raises ConfigError.
    """
    evaluator = Evaluator(to_be_evaluated(config))
    runs = [_one_run(config, repeat, target, evaluator) for repeat in range(repeats)]
    reached = [one[-1] for one in runs if one[-1].avg_at_k >= target]
    return {
        "what": "seconds from the first step to the target",
        "target": target,
        "problems": config.eval.problems,
        "k": config.eval.k,
        "runs": repeats,
        "reached": len(reached),
        "seconds": spread([one.since_first_step_s for one in reached]) if reached else None,
        "steps": spread([float(one.step) for one in reached]) if reached else None,
        "looks": [[asdict(look) for look in one] for one in runs],
        "machine": machine(),
    }


def _one_run(config: Config, repeat: int, target: float, evaluator: Evaluator) -> list[Looked]:
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        changes = {"name": f"bench-{repeat}", "runs_dir": folder, "seed": config.seed + repeat}
        here = to_be_evaluated(Config.model_validate(config.model_dump() | changes))
        run_quietly(here)
        torch.set_num_threads(config.eval.threads)
        return looks_until(evaluator, here.run_dir, target)
