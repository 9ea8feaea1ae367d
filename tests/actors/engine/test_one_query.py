"""Attention of a decode step on a CPU, against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.engine import slots
from actors.engine.attention import ONE_QUERY, one_query
from actors.engine.slots import KV_BLOCK, SlotModel
from tests.actors.engine.test_engine import qwen3

ROWS, WIDTH, LENGTH, CAPACITY = 3, 20, 33, 50


def states(heads: int, groups: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as the slots show them: the first positions of longer rows."""
    draw = torch.Generator().manual_seed(heads * 10 + groups)
    query = torch.randn(ROWS, queries, heads, WIDTH, generator=draw).transpose(1, 2)
    key, value = (torch.randn(ROWS, groups, CAPACITY, WIDTH, generator=draw)[:, :, :LENGTH] for _ in range(2))
    return query, key, value


def mask(heads: int) -> Tensor:
    seen = torch.randint(1, LENGTH, (ROWS, heads, 1, 1), generator=torch.Generator().manual_seed(heads))
    added = torch.zeros(ROWS, heads, 1, LENGTH)
    return added.masked_fill_(torch.arange(LENGTH) > seen, torch.finfo(torch.float32).min)


def by_torch(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float | None) -> Tensor:
    result = torch.nn.functional.scaled_dot_product_attention(
        query.double(),
        key.double(),
        value.double(),
        attn_mask=None if added is None else added.double(),
        scale=scale,
        enable_gqa=True,
    )
    return result.transpose(1, 2).float()


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", ["not", "all heads alike", "each head"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_torch_s(heads: int, groups: int, masked: str, scale: float | None) -> None:
    query, key, value = states(heads, groups)
    added = {"not": None, "all heads alike": mask(1), "each head": mask(heads)}[masked]
    found, _ = one_query(nn.Module(), query, key, value, added, scaling=scale)
    torch.testing.assert_close(found, by_torch(query, key, value, added, scale), rtol=0, atol=2e-6)


def test_booleans_and_several_queries_go_to_sdpa() -> None:
    query, key, value = states(4, 4)
    added = mask(1)
    found, _ = one_query(nn.Module(), query, key, value, added == 0)
    torch.testing.assert_close(found, by_torch(query, key, value, added, None), rtol=0, atol=2e-6)
    query, key, value = states(4, 4, queries=2)
    two = added.expand(-1, -1, 2, -1)
    found, _ = one_query(nn.Module(), query, key, value, two)
    torch.testing.assert_close(found, by_torch(query, key, value, two, None), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, ONE_QUERY), (torch.bfloat16, "sdpa"), (torch.float64, "sdpa")]
)
def test_it_is_for_float32_only(dtype: torch.dtype, name: str) -> None:
    model = qwen3().to(dtype)
    SlotModel(model, slots=1, capacity=8)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize(
    ("longest", "queries", "reads"),
    [
        (20, 1, KV_BLOCK),
        (60, 1, 2 * KV_BLOCK),  # less than two thirds of the capacity
        (80, 1, 128),
        (80, 2, 3 * KV_BLOCK),  # only one query reads beyond what it needs
        (128, 1, 128),
    ],
)
def test_short_pieces_are_read_to_their_end(
    longest: int, queries: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SlotModel(qwen3(), slots=2, capacity=128)
    tokens, nothing = np.zeros((2, longest), dtype=np.int64), np.zeros(2, dtype=np.int64)
    model.forward(None, tokens, nothing, nothing + longest - queries, [])
    seen: list[int] = []
    plain = model._run

    def watched(*given: Any) -> Tensor:
        seen.append(len(given[5]))
        return plain(*given)

    monkeypatch.setattr(model, "_run", watched)
    step = (None, tokens[:, :queries], nothing + longest - queries, nothing + queries, [queries - 1])
    found = model.forward(*step)
    assert seen == [reads]
    monkeypatch.setattr(slots, "SMALL_PIECE", 0)
    torch.testing.assert_close(model.forward(*step), found, rtol=0, atol=1e-5)
    assert seen[1] == -(-longest // KV_BLOCK) * KV_BLOCK
