"""Coverage-guided fuzzing of every decoder: `.venv/bin/python tests/fuzz/fuzz_messages.py -runs=1000000`.

Takes libFuzzer's options; without a corpus folder among them it begins with valid records. An input that fails is
written to `crash-…` in the folder that it was started in. Needs the optional dependencies `fuzz`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["common.wire.messages"]):
    import common.wire.messages  # noqa: F401
from fuzzing import run
from properties import check_record, mutate_tree, records

_VALID = records()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations change one value of a record that stays whole, or of a valid one: bytes alone seldom get
    past msgpack, and then past the first field."""
    draw = random.Random(seed)
    what = draw.random()
    if what < 0.5:
        data = mutate_tree(data if what < 0.25 else draw.choice(_VALID), draw)
        return data if len(data) <= max_size else data[:max_size]
    return bytes(atheris.Mutate(data, max_size))


if __name__ == "__main__":
    run(check_record, _VALID, mutate, "-max_len=16384")
