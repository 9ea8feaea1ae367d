"""Learning rates against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from learner.schedule import learning_rate, learning_rate_by_tokens


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # base / warmup
        (1, 0.50),
        (3, 1.00),  # the warm-up's last step reaches the base
        (4, 1.00),  # cos 0
        (6, 0.75),  # a third of the way: (1 + cos 60 deg) / 2
        (7, 0.50),  # half way: (1 + cos 90 deg) / 2
        (8, 0.25),
        (9, 0.0669872981),  # (1 + cos 150 deg) / 2: the last step of the run still moves
        (10, 0.0),
        (11, 0.0),
    ],
)
def test_cosine_by_hand(step: int, expected: float) -> None:
    rate = learning_rate(step, base=1.0, schedule="cosine", warmup_steps=4, max_steps=10)
    assert rate == pytest.approx(expected, abs=1e-9)


def test_the_base_scales_everything() -> None:
    rates = [learning_rate(s, base=2e-5, schedule="cosine", warmup_steps=4, max_steps=10) for s in (0, 6, 10)]
    assert rates == pytest.approx([5e-6, 1.5e-5, 0.0], abs=1e-15)


def test_constant_by_hand() -> None:
    rates = [learning_rate(s, base=3.0, schedule="constant", warmup_steps=3, max_steps=5) for s in (0, 1, 2, 3, 99)]
    assert rates == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0])


def test_without_warmup_the_first_step_has_the_base() -> None:
    assert learning_rate(0, base=0.5, schedule="cosine", warmup_steps=0, max_steps=8) == 0.5
    assert learning_rate(0, base=0.5, schedule="constant", warmup_steps=0, max_steps=8) == 0.5


def test_a_warmup_as_long_as_the_run_or_longer() -> None:
    rates = [learning_rate(s, base=1.0, schedule="cosine", warmup_steps=4, max_steps=2) for s in range(4)]
    assert rates == [0.25, 0.5, 0.0, 0.0]
    rates = [learning_rate(s, base=1.0, schedule="cosine", warmup_steps=2, max_steps=2) for s in range(3)]
    assert rates == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"warmup_steps": -2}, "warmup_steps is -2"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, constant"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "step": 0,
        "base": 1.0,
        "schedule": "cosine",
        "warmup_steps": 1,
        "max_steps": 9,
    }
    with pytest.raises(ValueError, match=message):
        learning_rate(**(arguments | change))


# --- by tokens: a budget of 1,000, of which 400 warm up ---

BY_TOKENS: dict[str, Any] = {"own": 100, "base": 1.0, "schedule": "cosine", "warmup_ratio": 0.4, "max_tokens": 1000}


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (0, 0.25),  # own / warm-up: the first step moves
        (100, 0.50),
        (250, 0.875),
        (350, 1.00),  # 450 / 400: never above the base
        (400, 1.00),  # cos 0
        (600, 0.75),  # a third of the way: (1 + cos 60 deg) / 2
        (700, 0.50),
        (900, 0.0669872981),  # (1 + cos 150 deg) / 2
        (1000, 0.0),
        (1234, 0.0),
    ],
)
def test_cosine_by_tokens_by_hand(generated: int, expected: float) -> None:
    assert learning_rate_by_tokens(generated, **BY_TOKENS) == pytest.approx(expected, abs=1e-9)
    assert learning_rate_by_tokens(generated, **(BY_TOKENS | {"base": 2e-5})) == pytest.approx(2e-5 * expected)


def test_constant_by_tokens_by_hand() -> None:
    constant = BY_TOKENS | {"schedule": "constant"}
    rates = [learning_rate_by_tokens(generated, **constant) for generated in (0, 100, 400, 999, 5000)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 1.0])


def test_without_warmup_the_first_tokens_have_the_base() -> None:
    assert learning_rate_by_tokens(0, **(BY_TOKENS | {"warmup_ratio": 0.0})) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": -1}, "own is -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0, expected 0 <= r < 1"),
        ({"schedule": "linear"}, "schedule is 'linear', expected one of cosine, constant"),
    ],
)
def test_what_is_refused_by_tokens(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate_by_tokens(0, **(BY_TOKENS | change))
    with pytest.raises(ValueError, match="generated is -1"):
        learning_rate_by_tokens(-1, **BY_TOKENS)
