"""Memory: rows of logits at a time, and rollouts in the data Redis, by one formula for the feeder, the learner and the
check of a config.

Measured on 6.2 and 7.0 (tests/common/test_footprint.py checks it): with larger chunks the allocator rounds up more,
by a quarter at most; with smaller ones fields, notices and headers dominate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config import Config

LEARNER_PIECE_ROWS, TEACHER_PIECE_ROWS = 256, 128
"""Rows of logits at a time: enough for a head's product, and few beside the thousands of a forward. Each role holds two
matrices [rows, vocabulary] of 4 bytes a number."""

ALLOWED_SHARE = 0.75  # of maxmemory: above it nothing is admitted (lua/admit.lua); above 0.85 chunks are refused
RECORDS_AT_A_TIME = 16  # whole rollouts that are read in one round trip: Redis holds them twice meanwhile
_SERVER_BYTES = 2 << 20  # a server with nothing in it, its clients' buffers, the run's groups and scripts
_CHUNK_BYTES = 560  # a chunk beyond its numbers: names, entries of the hash, other fields of its records
_VIEW_BYTES = 96  # of those, its view's
_RECORD_BYTES = 1536  # a rollout beyond its chunks: prompt and verdict beyond their numbers, notices, owners
_ROUNDED_UP = 1.25
_MB = 1 << 20


def rollout_bytes(config: Config) -> int:
    """Most bytes that a rollout can use: one of full length that waits to be booked."""
    return growth_bytes(config, 0)


def growth_bytes(config: Config, length: int) -> int:
    """Most bytes by which a rollout with `length` stored tokens may still grow, until it waits to be booked.

    A token has, for K outcomes and STOP: ids 4 K (half of that if 16 bits hold them), log-probabilities 4 (K + 1), six
    more numbers of 4 bytes, and two in each copy of the verdict, in its record and on the way to the books. The
    log-probabilities are the student's until the teacher's take their place; the teacher's own K' outcomes come with
    them. A view (`Config.stores_view`) is three more numbers, and three in each copy of the verdict. Tokens that the
    teacher has not scored yet count as not written.
    """
    rollout = config.rollout
    scored = max(0, length - rollout.max_unscored_chunks * rollout.chunk_tokens)
    left = max(0, rollout.max_completion_length - scored)
    # New weights close every open chunk: at most as often as a trajectory's allowed staleness.
    chunks = -(-left // rollout.chunk_tokens) + config.learner.max_staleness + 1
    outcomes = config.termination.teacher_top_k + rollout.teacher_support
    written = (8 * outcomes + 28) * left + 16 * rollout.max_completion_length
    of_chunk = _CHUNK_BYTES
    if config.stores_view:
        written += 12 * left + 24 * rollout.max_completion_length
        of_chunk += _VIEW_BYTES
    return int(_ROUNDED_UP * written) + chunks * of_chunk + 4 * config.data.max_prompt_length + _RECORD_BYTES


def most_bytes(config: Config) -> int:
    """Most bytes in use if nothing waits for memory: rollouts of full length, including those trained since the last
    checkpoint."""
    learner = config.learner
    steps = min(learner.fresh_steps + config.checkpoints.every_steps, learner.max_steps)
    return _SERVER_BYTES + (steps * learner.batch_size + RECORDS_AT_A_TIME) * rollout_bytes(config)


def least_bytes(config: Config) -> int:
    """Bytes without which a run may stand still: one batch of rollouts of full length, while some of them are read.

    With this minimum, steps run one after the other, each followed by a checkpoint, which makes room for the next.
    """
    return _SERVER_BYTES + (config.learner.batch_size + RECORDS_AT_A_TIME) * rollout_bytes(config)


def maxmemory_mb(needed: int) -> int:
    """The `maxmemory` whose ALLOWED_SHARE is this many bytes."""
    return int(needed / ALLOWED_SHARE / _MB) + 1


def free_bytes(memory: Mapping[str, Any]) -> float:
    """Bytes that work may still use, by `INFO memory`; below 0 if it uses too much, infinite without a limit."""
    limit = int(memory["maxmemory"])
    return ALLOWED_SHARE * limit - int(memory["used_memory"]) if limit else float("inf")
