"""What LoRA trains and stores of a model, beside all of it: parameters, checkpoint, published weights, adapter.

    .venv/bin/python benchmarks/lora_sizes.py --rank 16

The model has the shape of Qwen3-0.6B and no weights (torch's device `meta`); its adapters are real, take a step of
AdamW, and are written by the code of a run. What full training would write is counted: float32, and two moments.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engine.adapters import Adapter, header_of, merged, weights_digest
from actors.engine.base_files import BaseFiles
from common.config import Lora
from learner import checkpoint
from learner.lora import factors_of, inject, missing, targets_of

QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def sizes(shape: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Numbers of parameters, and bytes of files, with LoRA and without."""
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape))
    whole = sum(one.numel() for one in model.parameters())
    base = {name: tuple(one.shape) for name, one in model.named_parameters()}
    inject(model, lora, targets_of(model, lora.target_modules))
    for module in model.modules():  # the adapters alone become real
        for name, one in module.named_parameters(recurse=False):
            if one.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.randn(one.shape) * 0.01))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.ones_like(one)
    optimizer.step()
    numbers = sum(one.numel() for one in trained)
    adapter = Adapter("0" * 64, lora.alpha / lora.rank, factors_of(model))
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        state = checkpoint.capture(model, optimizer, step=1, policy_version=1, consumed=(), counters={})
        saved = checkpoint.save(Path(folder), state, keep=1)
        published = Path(folder) / "v.safetensors"
        save_file(adapter.tensors(), published, header_of(adapter.base, adapter.scaling))
        files = {
            "checkpoint_bytes": sum(path.stat().st_size for path in saved.iterdir()),
            "published_bytes": published.stat().st_size,
        }
    return {
        "rank": lora.rank,
        "trained_parameters": _beside(numbers, whole),
        "checkpoint_bytes": _beside(files["checkpoint_bytes"], 12 * whole),
        "published_bytes": _beside(files["published_bytes"], 4 * whole),
        "published_bytes_beside_a_bfloat16_model": _beside(files["published_bytes"], 2 * whole),
        **_seconds_to_merge(adapter),
        **_seconds_to_write(adapter, base),
    }


def _beside(lora: int, full: int) -> dict[str, float]:
    return {"lora": lora, "full": full, "share": lora / full}


def _seconds_to_merge(adapter: Adapter) -> dict[str, float]:
    """What a worker on this CPU does for each version, in bfloat16, in processor time of one thread; and the same by
    torch's product of matrices, whose bits differ from machine to machine. Layer by layer in turn."""
    torch.set_num_threads(1)
    shapes = {(len(left), right.shape[1]) for left, right in adapter.factors.values()}
    bases = {shape: torch.randn(shape).bfloat16() for shape in shapes}
    merge_s = product_s = 0.0
    for left, right in adapter.factors.values():
        base = bases[len(left), right.shape[1]]
        began = time.process_time()
        merged(base, left, right, adapter.scaling)
        between = time.process_time()
        (base.float() + (left * adapter.scaling) @ right).bfloat16()
        merge_s += between - began
        product_s += time.process_time() - between
    return {"merge_cpu_s": merge_s, "merge_by_product_cpu_s": product_s}


def _seconds_to_write(adapter: Adapter, base: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """What a worker before a vLLM server does for each version, in bfloat16, by one thread: a file of whole weights,
    from a file. The second of two."""
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        save_file({one: torch.randn(shape).mul_(0.02).bfloat16() for one, shape in base.items()}, model)
        files = BaseFiles(folder, torch.bfloat16)
        files.check(replace(adapter, base=weights_digest(folder)))
        out = folder / "merged"
        for _ in range(2):
            cpu, wall = time.process_time(), time.monotonic()
            files.write(out, adapter)
            found = {"merged_file_cpu_s": time.process_time() - cpu, "merged_file_wall_s": time.monotonic() - wall}
        return {**found, "merged_file_bytes": out.stat().st_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=QWEN3_0_6B["num_hidden_layers"], help="fewer for a quick look")
    arguments = parser.parse_args()
    if problem := missing():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    shape = QWEN3_0_6B | {"num_hidden_layers": arguments.layers}
    print(json.dumps(sizes(shape, Lora(rank=arguments.rank)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
