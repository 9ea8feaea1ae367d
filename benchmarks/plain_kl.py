"""On-policy distillation in its plainest form, to hold Katana's losses against: no queue, no support, no cut.

    .venv/bin/python benchmarks/plain_kl.py forward runs/plain-forward [--steps 26] [--learning-rate 5e-4] [--seed 0]
    .venv/bin/katana eval ops/experiments/demo.yaml --model runs/plain-forward --k 4 --set eval.problems=192

Each step the shipped student writes 32 rollouts (transformers' `generate`), both models read them, and the mean over
their tokens of KL(student || teacher) (reverse) or KL(teacher || student) (forward) over the whole vocabulary is
minimised: AdamW, gradient norm at most 1, the demo's schedule. The student that results is written to a folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import Config, load
from learner.schedule import learning_rate
from ops.cli.arguments import positive
from ops.tasks.source import TaskSource

ROOT = Path(__file__).parent.parent
STOP, PAD = 1, 0  # of the shipped models


def batch_of(source: TaskSource, step: int, size: int) -> tuple[Tensor, Tensor]:
    """Prompts of a step, padded on the left, int64 [size, m], and their mask."""
    prompts = [source.prompt(step * size + place) for place in range(size)]
    longest = max(map(len, prompts))
    ids, mask = (torch.zeros(size, longest, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def divergence(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """KL per token in nats, [...], of log-probabilities [..., V]."""
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    return (first.exp() * (first - second)).sum(-1)


def step_of(
    student: PreTrainedModel, teacher: PreTrainedModel, prompts: Tensor, mask: Tensor, config: Config, direction: str
) -> Tensor:
    """The loss of one batch: a scalar, with its graph."""
    with torch.no_grad():
        texts: Tensor = student.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=config.rollout.max_completion_length,
            eos_token_id=STOP,
            pad_token_id=PAD,
        )
    ended = (texts[:, prompts.shape[1] :] == STOP).cumsum(1)
    written = (ended == 0) | ((ended == 1) & (texts[:, prompts.shape[1] :] == STOP))
    attended = torch.cat([mask, written.long()], dim=1)
    inputs = {
        "input_ids": texts,
        "attention_mask": attended,
        "position_ids": (attended.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": written.shape[1] + 1,
    }
    ours = student(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        theirs = teacher(**inputs).logits[:, :-1].log_softmax(-1)
    return divergence(ours, theirs, direction)[written].mean()


def train(direction: str, *, steps: int, rate: float, seed: int) -> PreTrainedModel:
    """The student after `steps`; a line to standard error for each."""
    config = load(ROOT / "ops/experiments/demo.yaml", [f"seed={seed}"])
    source = TaskSource(config)
    torch.manual_seed(seed)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ROOT / model)
        for model in (config.student.model, config.all_teachers[""].model)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    warmup = max(1, round(config.learner.warmup_ratio * steps))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, base=rate, schedule=config.learner.schedule, warmup_steps=warmup, max_steps=steps
        )
        loss = step_of(student, teacher, *batch_of(source, step, config.learner.batch_size), config, direction)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.learner.max_grad_norm)
        optimizer.step()
        print(f"step {step + 1}: {loss.item():.4f} nats a token", file=sys.stderr)
    return student


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("direction", choices=("forward", "reverse"))
    parser.add_argument("folder", type=Path, help="where to write the student; must not be there")
    parser.add_argument("--steps", type=positive, default=26)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if given.folder.exists():
        parser.error(f"{given.folder} is there already; expected a new folder")
    if not 0 < given.learning_rate < 1:
        parser.error(f"--learning-rate {given.learning_rate}: expected a number above 0 and below 1")
    torch.set_num_threads(1)
    student = train(given.direction, steps=given.steps, rate=given.learning_rate, seed=given.seed)
    student.save_pretrained(given.folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "ops/models/student" / file, given.folder)
    print(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
