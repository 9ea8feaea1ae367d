"""Names of the numbered fields of a rollout's record, `rollout:{rid}`: one of each kind for each chunk."""

from __future__ import annotations

import re

TOKENS = "t"  # ChunkTokens, by the rollout worker
SUPPORT = "p"  # ChunkSupport, by the rollout worker
LOGPROBS = "s"  # ChunkLogprobs, by the rollout worker, until the chunk is scored
DIVERGENCE = "d"  # ScoreDivergence, by the teacher worker
SCORES = "q"  # ScoreSupport, by the teacher worker
VIEWED = "v"  # ScoreView, by the teacher worker, in runs that read it
_FIELD = re.compile(rf"([{TOKENS}{SUPPORT}{LOGPROBS}{DIVERGENCE}{SCORES}{VIEWED}]):([0-9]{{1,9}})".encode())


def tokens_field(seq: int) -> str:
    return f"{TOKENS}:{seq}"


def support_field(seq: int) -> str:
    return f"{SUPPORT}:{seq}"


def logprobs_field(seq: int) -> str:
    return f"{LOGPROBS}:{seq}"


def divergence_field(seq: int) -> str:
    return f"{DIVERGENCE}:{seq}"


def scores_field(seq: int) -> str:
    return f"{SCORES}:{seq}"


def view_field(seq: int) -> str:
    return f"{VIEWED}:{seq}"


def part_of(field: bytes) -> tuple[str, int] | None:
    """Kind and chunk of a field, by its stored name; None for a field of the whole rollout."""
    found = _FIELD.fullmatch(field)
    return (found[1].decode(), int(found[2])) if found else None


def holds_tokens(field: bytes) -> bool:
    """Whether a field is, or was meant to be, the tokens of a chunk."""
    return field.startswith(f"{TOKENS}:".encode())
