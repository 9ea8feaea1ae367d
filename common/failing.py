"""Exceptions as one line of text, and whether they mean that memory ran out. No torch."""

from __future__ import annotations

_WORDS_OF_MEMORY = ("out of memory", "can't allocate memory")


def brief(error: Exception) -> str:
    """An error in one line, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def out_of_memory(error: Exception) -> bool:
    """Whether the error means out of memory, on any device: PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS_OF_MEMORY)
