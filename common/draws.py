"""Random draws that depend only on their arguments, so that a replay draws the same. No state, no clock."""

from __future__ import annotations

import hashlib


def uniform_bits(seed: int, what: str, index: int = 0) -> int:
    """64 bits, uniform over seeds; other words for `what`, or other indices, give independent ones."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{what}:{index}".encode(), digest_size=8).digest(), "big")


def fraction(seed: int, what: str, index: int = 0) -> float:
    """`uniform_bits` as a number from 0 (inclusive) to 1."""
    return (uniform_bits(seed, what, index) >> 11) / 2**53


def rollout_seed(seed: int, number: int) -> int:
    """The seed, 0 … 2^63 - 1, of the rollout that a run of this seed admitted as that number."""
    return uniform_bits(seed, "rollout", number) >> 1
