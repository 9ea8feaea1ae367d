"""Models of Qwen3's shapes with random weights, what a token of them costs at least, and how fast the device is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from made_pair import EOS_ID, PAD_ID, make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

DTYPE = torch.bfloat16
BYTES = 2  # of a number in it


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Qwen3 model. `tied`: embedding and head are one matrix."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    ids: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a forward must read: all matrices, the head too; of an embedding only rows."""
        return BYTES * (self.layers * self.layer_weights + self.ids * self.hidden_size)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        return BYTES * 2 * self.layers * self.key_value_heads * self.head_dim

    def forward_flops(self, prompt: int, completion: int) -> float:
        """Of a forward of one text: two for each weight and token, the head at the completion's tokens alone, and in
        attention four for each pair of a token and one that it sees."""
        length = prompt + completion
        pairs = length * (length + 1) / 2
        body = 2 * self.layers * self.layer_weights * length
        head = 2 * self.ids * self.hidden_size * completion
        return body + head + 4 * self.layers * self.heads * self.head_dim * pairs


_IDS = 151_936
SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, 128, _IDS, tied=True),
    "1.7B": Shape(2048, 6144, 28, 16, 8, 128, _IDS, tied=True),
    "8B": Shape(4096, 12288, 36, 32, 8, 128, _IDS, tied=False),
}
"""The shapes of Qwen3-0.6B, 1.7B and 8B, by name."""

TINY = {
    "0.6B": Shape(64, 128, 2, 4, 2, 16, 512, tied=True),
    "1.7B": Shape(96, 192, 2, 6, 2, 16, 512, tied=True),
    "8B": Shape(128, 256, 3, 8, 2, 16, 512, tied=False),
}
"""Under the same names shapes that show whether everything runs."""


def make_model(shape: Shape, device: str, seed: int = 0) -> PreTrainedModel:
    """Random weights in bfloat16, made on the device. Every id is about equally likely, so a rollout hardly ever ends
    by itself before its limit."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.ids,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    with torch.device(device):
        options: dict[str, Any] = {"dtype": DTYPE, "attn_implementation": "sdpa"}
        made: Any = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    model: PreTrainedModel = made.eval().requires_grad_(False)
    return model


def folder_of(name: str, shape: Shape, device: str, work: Path) -> Path:
    """The folder of a model with its tokenizer; written where it is not there yet, whole or not at all."""
    folder = work / name
    if not folder.is_dir():
        draft = work / f"{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        make_model(shape, device).save_pretrained(draft)
        make_tokenizer(shape.ids).save_pretrained(draft)
        draft.rename(folder)
        free(device)
    return folder


# --- the device ------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    """Until the device has done what it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def free(device: str) -> None:
    """Give what nothing holds any more back to the device, and begin to watch the most memory anew."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str, size: int) -> float:
    """Floating point operations a second of a product of two bfloat16 matrices of `size` rows and columns."""
    left, right = (torch.randn(size, size, dtype=DTYPE, device=device) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _seconds(act: Callable[[], object], device: str) -> float:
    """The median of several times, after a few that warm up."""
    times = []
    for _ in range(13):
        wait(device)
        began = time.perf_counter()
        act()
        wait(device)
        times.append(time.perf_counter() - began)
    return median(times[3:])
