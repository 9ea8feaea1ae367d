"""Runs the roles' engines one after the other in a process of its own, and prints what each took as JSON: its weights,
and the peak of resident memory above that with the weights loaded, by the kernel.

    python tests/role_memory.py FOLDER CASES    CASES: JSON, a list of {"role": …, …}; FOLDER: of a model
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from samples import make_config

from actors.engine import Decoder, Scorer, ScoreRequest
from actors.engine.models import load_model
from common.config import Config
from learner.batch import Trajectory
from ops.bench.learner import measure_steps
from ops.bench.resident import forget_peak, peak_mb

VOCAB, SUPPORT, LENGTH = 8_000, 16, 128


def write(model: Any, case: dict[str, Any]) -> None:
    """A rollout worker, or the evaluator: all slots full, prompts as long as the cache."""
    engine = Decoder(
        model,
        slots=case["slots"],
        max_length=LENGTH,
        stop_ids=(0,),
        vocab_size=VOCAB,
        teacher_top_k=SUPPORT,
        chunk_tokens=32,
        prefill_tokens=case["prefill"],
        top_p=case["top_p"],
    )
    for row in range(case["slots"]):
        prompt = np.arange(1 + row, LENGTH - 2 + row, dtype=np.int32)
        engine.add(str(row), prompt, seed=row, max_new_tokens=2)
    while engine.busy:
        engine.step()


def score(model: Any, case: dict[str, Any]) -> None:
    """A teacher worker: two chunks of every slot."""
    slots, chunk = case["slots"], 32
    engine = Scorer(
        model, slots=slots, max_length=LENGTH, stop_ids=(0,), vocab_size=VOCAB, prefill_tokens=case["prefill"]
    )
    support = np.arange(1, 1 + SUPPORT, dtype=np.int32)[None].repeat(chunk, axis=0)
    texts = np.random.default_rng(0).integers(1, VOCAB, (slots, LENGTH)).astype(np.int32)
    for start in (0, chunk):
        begin = LENGTH - 2 * chunk
        engine.score(
            [
                ScoreRequest(str(row), text[:begin], start, text[begin + start :][:chunk], support)
                for row, text in enumerate(texts)
            ]
        )


def learner_config(folder: Path, run: Path, settings: dict[str, Any]) -> Config:
    learner = {"batch_size": 4, "max_staleness": 100, "weight_sync_steps": 1} | settings
    both = {"student": {"model": str(folder)}, "teacher": {"model": str(folder)}}
    return make_config(
        run, **both, learner=learner, data={"max_prompt_length": 32}, rollout={"max_completion_length": LENGTH - 32}
    )


def train(folder: Path, case: dict[str, Any]) -> None:
    """The learner: four steps of full-length trajectories."""
    measure_steps(learner_config(folder, folder, case["settings"]), [_trajectory(number) for number in range(8)], 0)


def _trajectory(number: int) -> Trajectory:
    rng, kept = np.random.default_rng(number), LENGTH - 32
    return Trajectory(
        rid=f"r{number:09d}",
        arm="treated",
        prompt=rng.integers(1, VOCAB, 32).astype(np.int32),
        tokens=rng.integers(1, VOCAB, kept).astype(np.int32),
        support_ids=np.tile(np.arange(1, 1 + SUPPORT, dtype=np.int32), (kept, 1)),
        teacher_logprobs=np.full((kept, SUPPORT + 1), -6.0, np.float32),
        teacher_tail=np.full(kept, -0.1, np.float32),
        teacher_sampled=np.full(kept, -6.0, np.float32),
        rollout_logprobs=np.full(kept, -6.0, np.float32),
        sampling_logprobs=np.full(kept, -6.0, np.float32),
        oldest_version=0,
    )


def run(folder: Path, case: dict[str, Any]) -> int:
    """Bytes that the role of a case took."""
    if case["role"] == "learner":
        return growth(lambda: train(folder, case))
    model = load_model(folder, dtype=case["dtype"], device="cpu", vocab_size=VOCAB)
    work = write if case["role"] == "writer" else score
    return sum(one.nbytes for one in model.parameters()) + growth(lambda: work(model, case))


def growth(work: Callable[[], None]) -> int:
    """Bytes by which resident memory grew at most while `work` ran."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = forget_peak("cpu")
    work()
    return int((peak_mb("cpu") - before) * (1 << 20))


if __name__ == "__main__":
    model_folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for one in {case["role"]: case for case in cases}.values():  # what is loaded once belongs to the process
        run(model_folder, one)
    print(json.dumps([run(model_folder, case) for case in cases]))
