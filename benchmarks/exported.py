"""What TRL's side is given: the prompts that Katana's feeder would admit, in their order, and the settings."""

from __future__ import annotations

from typing import Any

from common.config import Config, ConfigError
from common.pretrained import check_pair
from learner.schedule import learning_rate
from ops.tasks.source import TaskSource


def export(config: Config, *, threads: int) -> dict[str, Any]:
    """The job of trl_side.py: as many prompts as the run has trajectories, text and token ids.

    Raises ConfigError for settings that TRL's trainer does not have, ModelError for a pair that cannot be used.
    """
    learner, pair = config.learner, check_pair(config)
    if set(pair.stop_ids) != set(pair.student.stop_ids):
        raise ConfigError("teacher.model: it ends with other tokens than the student; TRL knows the student's alone")
    if learner.max_generated_tokens is not None:
        raise ConfigError("learner.max_generated_tokens: TRL counts optimizer steps alone; expected null")
    source = TaskSource(config)
    problems = [number // config.data.num_generations for number in range(learner.max_steps * learner.batch_size)]
    rates = [
        learning_rate(
            step,
            base=learner.learning_rate,
            schedule=learner.schedule,
            warmup_steps=round(learner.warmup_ratio * learner.max_steps),
            max_steps=learner.max_steps,
        )
        for step in range(learner.max_steps)
    ]
    return {
        "student": str(pair.student.folder),
        "teacher": str(pair.teacher.folder),
        "stop_ids": list(pair.stop_ids),
        "steps": learner.max_steps,
        "batch_size": learner.batch_size,
        "learning_rates": rates,
        "betas": [learner.beta1, learner.beta2],
        "weight_decay": learner.weight_decay,
        "max_grad_norm": learner.max_grad_norm,
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "max_completion_length": config.rollout.max_completion_length,
        "seed": config.seed,
        "threads": threads,
        "prompts": [
            {"text": source.problem(number).prompt, "ids": source.prompt(number).tolist()} for number in problems
        ],
    }
