"""Outcomes against numbers worked by hand and slow float64 references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.outcomes import (
    FLOOR_NATS,
    check_stop_ids,
    log_outcomes,
    on_support,
    sample,
    student_support,
    support_size,
    uniforms,
)

P = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
LOG_P = P.log()


def slow_log_outcomes(logits: np.ndarray, stop_ids: list[int]) -> dict[int, float]:
    """One row, float64, outcome -> log-probability."""
    x = logits.astype(np.float64)
    log_z = x.max() + math.log(np.exp(x - x.max()).sum())
    log_p = {i: float(v - log_z) for i, v in enumerate(x)}
    stop = math.log(sum(math.exp(log_p[i]) for i in stop_ids))
    return {i: v for i, v in log_p.items() if i not in stop_ids} | {stop_ids[0]: stop}


def log_sum_exp(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(v - peak) for v in values))


def test_stop_ids_are_one_outcome_in_the_first_ones_column() -> None:
    out = log_outcomes(P.log() + 3.0, [1, 3], 4)
    assert out.exp()[0].tolist() == pytest.approx([0.1, 0.6, 0.3, 0.0])
    assert out[0, 3] == -torch.inf


def test_what_the_head_is_padded_with_has_no_probability() -> None:
    padded = torch.cat([LOG_P, torch.full((1, 3), 50.0)], dim=1)
    assert log_outcomes(padded, [1], 4).exp()[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_bfloat16_logits_give_float32_and_are_not_written_to() -> None:
    logits = torch.randn(3, 9, dtype=torch.bfloat16)
    before = logits.clone()
    out = log_outcomes(logits, torch.tensor([2, 5]), 9)
    assert out.dtype == torch.float32
    assert out.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert torch.equal(logits, before)
    assert log_outcomes(before.float(), [2], 9).data_ptr() != before.data_ptr()


def test_float32_logits_are_not_written_to() -> None:
    logits = torch.randn(3, 9)
    before = logits.clone()
    out = log_outcomes(logits, [2, 5], 9)
    student_support(out, 2, 3, stop_count=2)
    assert torch.equal(logits, before)


def test_impossible_outcomes_are_finite() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf, 0.0]])
    out = log_outcomes(logits, [0, 4], 5)
    assert out[0, 1] == FLOOR_NATS and out[0, 4] == -torch.inf
    ids, logprobs, tail = student_support(out, 0, 2, stop_count=2)
    assert 4 not in ids[0].tolist() and torch.isfinite(logprobs).all()
    assert tail is not None and tail[0] == FLOOR_NATS


def test_support_by_hand() -> None:
    out = log_outcomes(torch.tensor([[0.1, 0.2, 0.25, 0.05, 0.4]]).log(), [1, 3], 5)
    ids, logprobs, tail = student_support(out, 1, 2, stop_count=2)
    assert ids.tolist() == [[4, 2]]
    assert logprobs.exp()[0].tolist() == pytest.approx([0.25, 0.4, 0.25])
    assert tail is not None and tail.exp().tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("k", [3, 4, 64])
def test_tail_is_absent_where_the_support_is_everything(k: int) -> None:
    out = log_outcomes(torch.randn(2, 5), [1, 3], 5)
    ids, logprobs, tail = student_support(out.clone(), 1, k, stop_count=2)
    assert support_size(k, 5, 2) == 3
    assert tail is None and ids.shape == (2, 3) and logprobs.shape == (2, 4)
    assert sorted(ids[0].tolist()) == [0, 2, 4]
    assert on_support(out, ids, 1, stop_count=2)[1] is None


def test_a_tail_far_below_rounding_is_right() -> None:
    # 1 - sum of the support would be 0 here, or less.
    out = log_outcomes(torch.tensor([[40.0, 0.0, 0.0, -5.0]]), [1], 4)
    tail = student_support(out, 1, 1, stop_count=1)[2]
    assert tail is not None
    assert float(tail[0]) == pytest.approx(-40.0 + math.log(1.0 + math.exp(-5.0)), abs=1e-5)


def test_the_teacher_on_the_students_support_by_hand() -> None:
    logprobs, tail = on_support(LOG_P.clone(), torch.tensor([[2]]), 0, stop_count=1)
    assert logprobs.exp()[0].tolist() == pytest.approx([0.1, 0.3])
    assert tail is not None and tail.exp().tolist() == pytest.approx([0.6])


@st.composite
def distributions(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int]:
    vocab = draw(st.integers(3, 12))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=vocab) * scale
    stops = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=vocab - 1, unique=True))
    return logits.astype(np.float32), stops, draw(st.integers(1, vocab))


@settings(max_examples=150, deadline=None)
@given(distributions())
def test_support_equals_a_slow_reference(case: tuple[np.ndarray, list[int], int]) -> None:
    logits, stops, k = case
    slow = slow_log_outcomes(logits, stops)
    out = log_outcomes(torch.from_numpy(logits)[None], stops, len(logits))
    ids, logprobs, tail = student_support(out.clone(), stops[0], k, stop_count=len(stops))
    others = sorted((v for i, v in slow.items() if i != stops[0]), reverse=True)
    size = support_size(k, len(logits), len(stops))
    assert logprobs[0].tolist() == pytest.approx([slow[stops[0]], *others[:size]], abs=1e-4)
    assert [slow[i] for i in ids[0].tolist()] == pytest.approx(others[:size], abs=1e-4)
    rest = [v for i, v in slow.items() if i != stops[0] and i not in ids[0].tolist()]
    assert (tail is None) == (not rest)
    if tail is not None:
        assert float(tail[0]) == pytest.approx(log_sum_exp(rest), abs=1e-4)
    again, tail_again = on_support(out, ids, stops[0], stop_count=len(stops))
    assert torch.equal(again, logprobs)
    assert (tail is None) == (tail_again is None)
    if tail is not None and tail_again is not None:
        assert torch.equal(tail, tail_again)


def draw(probabilities: torch.Tensor, u: float, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Any, Any]:
    outcome, logprob = sample(
        probabilities.log().clamp(min=FLOOR_NATS), torch.tensor([u], dtype=torch.float64), temperature, top_p
    )
    return int(outcome), math.exp(float(logprob))


@pytest.mark.parametrize(("u", "expected"), [(0.0, 0), (0.09, 0), (0.11, 1), (0.31, 2), (0.59, 2), (0.61, 3)])
def test_inverse_cdf_by_hand(u: float, expected: int) -> None:
    assert draw(P, u) == (expected, pytest.approx(float(P[0, expected])))


def test_no_outcome_without_mass_is_drawn_at_the_ends() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    for top_p in (1.0, 0.9):
        assert draw(p, 0.0, top_p=top_p)[0] in (1, 2)
        assert draw(p, 1.0 - 2.0**-53, top_p=top_p)[0] in (1, 2)


def test_greedy_is_certain_of_the_most_probable() -> None:
    assert draw(P, 0.0, temperature=0.0) == (3, 1.0)


def test_temperature_by_hand() -> None:
    # At temperature 1/2 probabilities are squared: 1, 4, 9, 16 of 30.
    assert draw(P, 0.4, temperature=0.5) == (2, pytest.approx(9 / 30))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [3]), (0.39, [3]), (0.41, [3, 2]), (0.69, [3, 2]), (0.71, [3, 2, 1]), (0.95, [3, 2, 1, 0])],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    mass = sum(float(P[0, i]) for i in kept)
    for u in np.linspace(0.0, 0.999, 60):
        outcome, probability = draw(P, float(u), top_p=top_p)
        assert outcome in kept
        assert probability == pytest.approx(float(P[0, outcome]) / mass)


def test_nucleus_after_temperature_by_hand() -> None:
    # 16/30 and 9/30 are the two largest at temperature 1/2.
    assert draw(P, 0.99, temperature=0.5, top_p=0.8) == (2, pytest.approx(9 / 25))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9)])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    n = 40_000
    log_p = log_outcomes(torch.randn(1, 11, generator=torch.Generator().manual_seed(3)) * 1.5, [2, 7], 11)
    u = torch.from_numpy(uniforms(np.arange(n, dtype=np.uint64), np.full(n, 5)))
    outcome, logprob = sample(log_p.expand(n, -1), u, temperature, top_p)
    counts = np.bincount(outcome.numpy(), minlength=11)
    stated = {int(o): math.exp(float(v)) for o, v in zip(outcome, logprob, strict=True)}
    assert sum(stated.values()) == pytest.approx(1.0, abs=1e-5)
    statistic = sum((counts[o] - n * p) ** 2 / (n * p) for o, p in stated.items())
    # Chi-square with at most 9 degrees of freedom exceeds 40 with probability below 1e-5.
    assert counts[7] == 0 and statistic < 40


def splitmix64(seed: int, position: int) -> float:
    """The generator in Python integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & mask) + (position + 1) * golden) & mask) >> 11) / 2**53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_uniforms_equal_the_generator_in_integers(seed: int, position: int) -> None:
    got = uniforms(np.array([seed], dtype=np.uint64), np.array([position]))
    assert got.dtype == np.float64 and 0.0 <= got[0] < 1.0
    assert got[0] == splitmix64(seed, position)


def test_uniforms_of_neighbours_are_unrelated() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    u = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    for a, b in [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("stops", [(), (1, 1), (-1,), (4,), (0, 1, 2, 3)])
def test_stop_ids_that_make_no_sense_are_refused(stops: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stop_ids"):
        check_stop_ids(stops, 4)
