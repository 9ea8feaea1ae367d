"""Coverage-guided fuzzing of config files and overrides: `.venv/bin/python tests/fuzz/fuzz_config.py -runs=100000`.

Takes libFuzzer's options; without a corpus folder among them it begins with valid configs. An input that fails is
written to `crash-…` in the folder that it was started in. Needs the optional dependencies `fuzz`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["common.config", "yaml"]):
    import common.config  # noqa: F401
from fuzzing import run
from properties import WORDS, check_config, configs, mutate_bytes

_SEEDS = [data for data in configs() if len(data) < 400]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations put in or double pieces of YAML, a part of them in a config to begin with: most of what
    random changes lead to is no config any more."""
    draw = random.Random(seed)
    what = draw.random()
    if what < 0.5:
        return mutate_bytes(data if what < 0.25 else draw.choice(_SEEDS), draw, WORDS)[:max_size]
    return bytes(atheris.Mutate(data, max_size))


if __name__ == "__main__":
    # An input that takes seconds is a finding too.
    run(check_config, _SEEDS, mutate, "-max_len=400", "-timeout=10")
