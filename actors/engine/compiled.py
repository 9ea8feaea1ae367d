"""A decode step as compiled code: torch.compile, and on CUDA a CUDA graph for each number of rows and length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from common.compiler import has_cpp_compiler

Choice = Literal["auto", "on", "off"]

SHORTEST = 128
"""With CUDA graphs, the least length that is read; each longer one is twice as long: few graphs."""


class CompileError(RuntimeError):
    """The step cannot be compiled here, or computes something else when it is."""


def is_wanted(choice: Choice, device: torch.device) -> bool:
    """Whether to compile: `auto` where starting an operation takes longer than computing it, on a GPU. On a CPU a step
    takes a fifth less time, but the compiling takes half a minute (BENCHMARKS.md)."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """`function`, compiled at its first call for any number of rows and any length. The code is cached across
    processes by torch (TORCHINDUCTOR_CACHE_DIR). Raises CompileError where there is no compiler."""
    if device.type == "cuda":
        return torch.compile(function, dynamic=True, mode="reduce-overhead")
    if not has_cpp_compiler():
        raise CompileError("no C++ compiler: install g++, or set CXX")
    # One thread: a pool of compiling processes would outlive the few seconds for which it is used.
    return torch.compile(function, dynamic=True, options={"compile_threads": 1})


def next_step(device: torch.device) -> None:
    """Tell the CUDA graphs that the results of the last step have been read: their memory is written over."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def in_few_sizes(size: int, *, least: int, most: int) -> int:
    """The next power of two times `least`, at most `most`: each size has its own CUDA graph."""
    grown = least
    while grown < size:
        grown *= 2
    return min(grown, most)


def check_close(name: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Raise CompileError where two results of a model in `dtype` differ by more than 1e-3 (5e-2 in 16 bits) of the
    largest number (or 1)."""
    limit = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    worst = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
    if not worst <= limit:
        raise CompileError(f"its {name} differ by {worst:.3g} of the largest, more than {limit}")
