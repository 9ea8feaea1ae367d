"""Names of the numbered fields of a rollout's record, `rollout:{rid}`: one of each kind a chunk."""

from __future__ import annotations


def tokens_field(seq: int) -> str:
    """ChunkTokens, by the rollout worker."""
    return f"t:{seq}"


def support_field(seq: int) -> str:
    """ChunkSupport, by the rollout worker."""
    return f"p:{seq}"


def divergence_field(seq: int) -> str:
    """ScoreDivergence, by the teacher worker."""
    return f"d:{seq}"


def scores_field(seq: int) -> str:
    """ScoreSupport, by the teacher worker."""
    return f"q:{seq}"


def holds_tokens(field: bytes) -> bool:
    """Whether a field of a record, by its name as Redis tells it, is of this kind."""
    return field.startswith(b"t:")
