"""Speed, measured: the slot engine against a bare forward loop, a half-precision head with and without a float32
product, and the whole loop with each role's busy share."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from actors.engine import Decoder
from actors.engine.compiled import is_wanted
from actors.engine.head import Float32Head
from actors.engine.loaded import compile_step
from actors.engine.models import load_model
from common.config import Config
from common.pretrained import Pair, check_pair
from common.runfiles.names import BUSY
from common.runfiles.run import RunFolder, read_json
from ops.bench.counts import TeacherCounts
from ops.tasks.source import TaskSource

_WRITTEN = 160  # tokens a row in one repeat of the engine's bench
_HEAD = (1024, 151_936)  # hidden size and vocabulary of Qwen3-0.6B
_HEAD_ROWS = (1, 8, 32, 256)


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest of several repeats."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Where a figure comes from."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


# --- the engine --------------------------------------------------------------------------------------------------


def engine(config: Config, repeats: int) -> dict[str, Any]:
    """Decode tokens/s of the slot engine and of a bare `model.forward` loop, alternately, at the same batch.

    The bare loop has transformers' own KV cache and attention, one prompt length, takes the argmax, and records
    nothing. The engine samples, and records support, tail and log-probabilities of every token. Both prefill outside
    the clock.
    """
    torch.set_num_threads(config.rollout.threads)
    pair = check_pair(config)
    # Each its own: the engine changes the attention of its model.
    untouched, model = (
        load_model(
            pair.student.folder, dtype=config.rollout.dtype, device=config.rollout.device, vocab_size=pair.vocab_size
        )
        for _ in range(2)
    )
    source = TaskSource(config)
    length = min(len(source.prompt(index)) for index in range(64))
    rows = config.most_slots
    prompts = np.stack([source.prompt(index)[:length] for index in range(rows)])
    tokens = min(_WRITTEN, config.rollout.max_completion_length)
    engines = {"engine": full_decoder(model, pair, config, prompts, tokens)}
    began = time.monotonic()
    if is_wanted(config.rollout.compile, model.device):
        engines["compiled"] = full_decoder(model, pair, config, prompts, tokens)
        compile_step(engines["compiled"], "on")
    compile_s = time.monotonic() - began
    found: dict[str, list[float]] = {name: [] for name in ("bare_forward_loop", *engines)}
    for repeat in range(repeats + 1):
        speeds = {"bare_forward_loop": _bare(untouched, prompts, tokens)}
        speeds |= {name: written_per_s(decoder, prompts, tokens) for name, decoder in engines.items()}
        if repeat:  # the first warms up
            for name, speed in speeds.items():
                found[name].append(speed)
    bare, plain = found["bare_forward_loop"], found["engine"]
    figures = {name: spread(speeds) for name, speeds in found.items()}
    ratios = {"ratio": spread([b / a for a, b in zip(bare, plain, strict=True)])}
    if (fast := found.get("compiled")) is not None:
        ratios["compiled_ratio"] = spread([b / a for a, b in zip(bare, fast, strict=True)])
        ratios["compiled_to_plain"] = spread([b / a for a, b in zip(plain, fast, strict=True)])
        figures["compile_s"] = {"once": compile_s}
    return {
        "what": "decode, tokens/s",
        "batch": rows,
        "tokens_a_row": tokens,
        **figures,
        **ratios,
        "machine": machine(),
    }


@torch.inference_mode()
def _bare(model: PreTrainedModel, prompts: Any, tokens: int) -> float:
    cache = DynamicCache()
    network: Any = model
    ids = torch.from_numpy(prompts.astype(np.int64)).to(model.device)
    logits = network(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    began = time.perf_counter()
    for _ in range(tokens):
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        logits = network(input_ids=ids, past_key_values=cache).logits
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return float(tokens * len(prompts) / (time.perf_counter() - began))


def full_decoder(model: PreTrainedModel, pair: Pair, config: Config, prompts: Any, tokens: int) -> Decoder:
    """A decoder with a slot for each row of `prompts` int32 [rows, m] and `tokens` more."""
    return Decoder(
        model,
        slots=len(prompts),
        max_length=prompts.shape[1] + tokens,
        stop_ids=pair.stop_ids,
        vocab_size=pair.vocab_size,
        teacher_top_k=config.termination.teacher_top_k,
        chunk_tokens=config.rollout.chunk_tokens,
        prefill_tokens=prompts.size,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
    )


def decode_speed(model: PreTrainedModel, pair: Pair, config: Config, prompts: Any, tokens: int) -> float:
    """`written_per_s` of a new decoder."""
    return written_per_s(full_decoder(model, pair, config, prompts, tokens), prompts, tokens)


def written_per_s(decoder: Decoder, prompts: Any, tokens: int) -> float:
    """Tokens a second of a `full_decoder`, all of its slots full, until it has written `tokens` for each row. Every
    step ends with what it has drawn on the host: the clock needs no wait."""
    added = 0

    def fill() -> None:
        # Rows that end by themselves are replaced, as in a run: the batch stays full.
        nonlocal added
        while decoder.free:
            prompt = prompts[added % len(prompts)]
            decoder.add(f"bench{added}", prompt, seed=added, max_new_tokens=tokens)
            added += 1

    fill()
    decoder.step()
    began, before = time.perf_counter(), decoder.decoded_tokens
    while decoder.decoded_tokens - before < tokens * len(prompts):
        decoder.step()
        fill()
    took = time.perf_counter() - began
    written = decoder.decoded_tokens - before
    for key in decoder.busy:
        decoder.remove(key)
    return float(written / took)


# --- the head ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def head(config: Config, repeats: int) -> dict[str, Any]:
    """Seconds of a bfloat16 head's product with a bfloat16 and with a float32 result, alternately, by rows."""
    torch.set_num_threads(config.rollout.threads)
    options: dict[str, Any] = {"bias": False, "device": config.rollout.device, "dtype": torch.bfloat16}
    plain, wide = nn.Linear(*_HEAD, **options), Float32Head(*_HEAD, **options)
    wide.weight = plain.weight
    rows = {}
    for count in _HEAD_ROWS:
        hidden = torch.randn(count, _HEAD[0], device=config.rollout.device, dtype=torch.bfloat16)
        pairs = [(_seconds(plain, hidden), _seconds(wide, hidden)) for _ in range(repeats + 1)][
            1:
        ]  # the first warms up
        rows[count] = {
            "bfloat16": spread([a for a, _ in pairs]),
            "float32": spread([b for _, b in pairs]),
            "ratio": spread([b / a for a, b in pairs]),
        }
    return {"what": "head, s", "hidden_size": _HEAD[0], "vocab_size": _HEAD[1], "rows": rows, "machine": machine()}


def _seconds(layer: nn.Module, hidden: torch.Tensor) -> float:
    began = time.perf_counter()
    layer(hidden)
    if hidden.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --- the loop ----------------------------------------------------------------------------------------------------


def loop(config: Config, repeats: int) -> dict[str, Any]:
    """Figures of whole runs (see `one_run`), and each role's busy share."""
    results = [one_run(config) for _ in range(repeats)]
    names = [name for name in results[0] if name != "busy"]
    busy = sorted({role for result in results for role in result["busy"]})
    return {
        "what": "whole runs",
        "steps": config.learner.max_steps,
        **{name: spread([result[name] for result in results]) for name in names},
        "busy": {role: spread([result["busy"].get(role, 0.0) for result in results]) for role in busy},
        "machine": machine(),
    }


def one_run(config: Config, warmup: int = 1) -> dict[str, Any]:
    """A whole run without evaluation, in a folder of its own: tokens/s and steps/s from the end of the learner's first
    `warmup` steps to that of its last, `tokens_forwarded_per_token_scored` by its teachers in that time
    (`forwarded_with_start`: in the whole run), and `busy` by role.

    The first step waits for models to load, and the next ones come too fast: workers have written ahead of the learner.
    Raises RuntimeError for a run that fails.
    """
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        tree = config.model_dump() | {"name": "bench", "runs_dir": folder}
        tree["eval"] |= {"every_steps": 0}
        here = Config.model_validate(tree)
        with TeacherCounts(here.run_dir) as counts:
            run_quietly(here)
        run = RunFolder(here.run_dir)
        steps, busy = list(run.steps()), read_json(run.path / BUSY)
    first, last = steps[warmup - 1], steps[-1]
    seconds = last.unix_s - first.unix_s
    return {
        "generated_tokens_per_s": ((last.tokens_generated or 0) - (first.tokens_generated or 0)) / seconds,
        "trained_tokens_per_s": (last.tokens_trained_total - first.tokens_trained_total) / seconds,
        "steps_per_s": (len(steps) - warmup) / seconds,
        "tokens_forwarded_per_token_scored": counts.forwarded_per_scored(first.unix_s),
        "forwarded_with_start": counts.forwarded_per_scored(),
        "busy": busy,
    }


def run_quietly(config: Config) -> None:
    """A whole run with standard output sent to standard error: only JSON belongs on the former. Raises RuntimeError."""
    from ops.run.local import run_locally
    from ops.run.nursery import begin_nursery

    with contextlib.redirect_stdout(sys.stderr), begin_nursery(config) as nursery:
        code = run_locally(config, nursery, resume=False, fresh=False)
    if code != 0:
        raise RuntimeError(f"the run to measure ended with {code}")
