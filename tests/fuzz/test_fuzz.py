"""A few thousand random inputs for the decoders and the config; `make fuzz` tries a million, guided by coverage."""

from __future__ import annotations

import random

import pytest
from properties import WORDS, check_config, check_record, configs, mutate_bytes, mutate_tree, records


@pytest.mark.slow
def test_valid_inputs_are_taken() -> None:
    assert [check_record(data) for data in records()] == [1] * len(records())
    assert sum(check_config(data) for data in configs()) > len(configs()) / 3


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_records_are_refused_or_hold_what_they_promise(seed: int) -> None:
    draw = random.Random(seed)
    seeds, taken = records(), 0
    for _ in range(3000):
        data = draw.choice(seeds)
        for _ in range(draw.randint(1, 2)):
            data = mutate_tree(data, draw) if draw.random() < 0.5 else mutate_bytes(data, draw)
        taken += check_record(data)
    assert taken > 50  # a fuzzer whose every input is refused at the door tests the door


def test_mutated_configs_are_taken_or_are_config_errors() -> None:
    draw = random.Random(1)
    seeds = [data for data in configs() if len(data) < 200]
    assert sum(check_config(mutate_bytes(draw.choice(seeds), draw, WORDS)) for _ in range(2000)) > 3
