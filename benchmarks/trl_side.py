"""TRL's side of the comparison: one run of its DistillationTrainer. Needs TRL's environment, and nothing of Katana.

    benchmarks/.venv-trl/bin/python benchmarks/trl_side.py JOB.json RESULT.json [--save FOLDER]

JOB.json is written by exported.py. Where TRL's default is only there to save memory on GPUs and costs time on a CPU, it
is off: gradient checkpointing, and bfloat16 (Katana's side computes in float32 too).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DistillationConfig, DistillationTrainer

PACKAGES = ("torch", "transformers", "trl", "accelerate")


class Journal(TrainerCallback):
    """When each optimizer step ended (seconds since 1970), and the tokens that were generated for it."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.ended_unix_s: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ended_unix_s.append(time.time())
        print(f"step {state.global_step}", flush=True)  # a run on the made pair takes minutes

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "completions/mean_length" in logs:  # the last line of a run is about the whole of it and has none
            self.tokens.append(round(logs["completions/mean_length"] * self._batch_size))
            self.losses.append(float(logs["loss"]))


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def settings_of(job: dict[str, Any], folder: str) -> DistillationConfig:
    return DistillationConfig(
        output_dir=folder,
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        max_grad_norm=job["max_grad_norm"],
        beta=1.0,  # reverse KL
        temperature=job["temperature"],
        top_p=job["top_p"],
        top_k=0,
        max_completion_length=job["max_completion_length"],
        shuffle_dataset=False,  # the prompts come in the order of Katana's feeder
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(job: dict[str, Any], folder: str, journal: Journal) -> DistillationTrainer:
    """Raises ValueError if TRL would not see the prompts, or the stop tokens, that Katana sees."""
    model = load(job["student"])
    # TRL's default optimizer is the fused AdamW as well; here with Katana's rate at every step.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=tuple(job["betas"]), weight_decay=job["weight_decay"], fused=True
    )
    rates = job["learning_rates"]
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left", local_files_only=True)
    texts = [prompt["text"] for prompt in job["prompts"]]
    trainer = DistillationTrainer(
        model=model,
        teacher_model=load(job["teacher"]),
        args=settings_of(job, folder),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[journal],
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])),
    )
    trainer.remove_callback(PrinterCallback)
    if tokenizer(text=texts)["input_ids"] != [prompt["ids"] for prompt in job["prompts"]]:
        raise ValueError("TRL's tokenizer gives other ids for the prompts than Katana's")
    if set(trainer.eos_token_ids) != set(job["stop_ids"]):
        raise ValueError(f"TRL ends with {trainer.eos_token_ids}, Katana with {job['stop_ids']}")
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--save", type=Path, help="folder for the trained model")
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text())
    torch.set_num_threads(job["threads"])
    journal = Journal(job["batch_size"])
    trainer = make_trainer(job, str(arguments.result.with_suffix(".trainer")), journal)
    trainer.train()
    if arguments.save:
        trainer.save_model(str(arguments.save))
    arguments.result.write_text(
        json.dumps(
            {
                "ended_unix_s": journal.ended_unix_s,
                "tokens": journal.tokens,
                "losses": journal.losses,
                "torch_threads": torch.get_num_threads(),
                "kv_cache": trainer.generation_config.use_cache
                is not False,  # None: transformers' default, which is yes
                "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            }
        )
    )


if __name__ == "__main__":
    main()
