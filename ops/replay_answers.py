"""Where the answers of right rollouts end, in tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

from common.config import ConfigError
from common.pretrained import ModelError
from ops.reading import Decode, Words, find_tokenizer
from ops.replay_record import Record
from ops.source import make_task

_REPLACEMENT = "\ufffd"  # what a decoder puts where bytes are no character yet


def answer_ends(record: Record, folder: Path) -> tuple[dict[int, int] | None, str]:
    """By place in the record, of right rollouts that count: the tokens that hold all up to the end of the answer.

    A rollout in whose text the task finds no answer is left out. None: nothing can be said, since no answer was
    verified, or tokenizer or data cannot be had here. The second says what is missing; empty where nothing is.
    """
    right = [place for place in record.counted if record.rollouts[place].correct]
    if all(record.rollouts[place].correct is None for place in record.counted):
        return None, "none was verified in this run"
    words = Words(record.config, folder)
    if words.missing:
        return None, f"not placed, for there is no tokenizer to read them with ({words.missing})"
    try:
        task = make_task(record.config, find_tokenizer(record.config, folder))
    except (ConfigError, ModelError) as error:
        return None, f"not placed, for the task's problems cannot be had ({error})"
    ends = {}
    for place in right:
        rollout = record.rollouts[place]
        ids = rollout.tokens.tolist()
        # As the verifier was given it: up to the first stop token.
        written = next((count for count, token in enumerate(ids) if token in words.stop_ids), len(ids))
        problem = task.problem(rollout.problem, split="train", seed=record.config.seed)
        end = task.answer_end(problem, words.decode(ids[:written]))
        if end is not None:
            ends[place] = tokens_of(ids[:written], end, words.decode)
    unplaced = len(right) - len(ends)
    return ends, f"in {unplaced:,} right rollouts the task finds no place of the answer" if unplaced else ""


def tokens_of(ids: Sequence[int], characters: int, decode: Decode) -> int:
    """The fewest first tokens whose text has so many characters, none of them unfinished; all where none has."""
    # The text of more tokens is never shorter: a bisection decodes a rollout of 500 tokens ten times, not 500 times.
    counts = range(len(ids) + 1)
    found = bisect.bisect_left(counts, characters, key=lambda count: len(decode(ids[:count]).rstrip(_REPLACEMENT)))
    return min(found, len(ids))
