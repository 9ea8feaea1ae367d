"""The estimators on the sampled token: mean and variance of value and gradient, by enumerating all outcomes.

Exact, without drawing anything: an outcome x has a value and a slope, its gradient by the student's logits is
slope x (onehot(x) - p), and means are sums over x with the probabilities with which x is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.divergences import LOG_FLOOR
from learner.sampled import clipped_sampled, importance_ratio, k1_sampled, k2_sampled, k3_sampled

OUTCOMES = 48
Estimator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From log p, log q, log p_sampled and log p_rollout of the outcomes."""

ESTIMATORS: dict[str, Estimator] = {
    "k1": lambda p, q, drawn, _: k1_sampled(p, q, drawn),
    "k2": lambda p, q, drawn, _: k2_sampled(p, q, drawn),
    "k3": lambda p, q, drawn, _: k3_sampled(p, q, drawn),
    "clipped": lambda p, q, drawn, written: clipped_sampled(p, q, drawn, written, clip_range=0.2),
}


class Case:
    """Student now, teacher and the student that wrote, float64 [OUTCOMES]; `gap` and `age`: how far the others are."""

    def __init__(self, seed: int, gap: float, age: float, temperature: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits, other, former = torch.randn(3, OUTCOMES, generator=generator, dtype=torch.float64)
        self.p = (2 * logits).log_softmax(0)
        self.q = (2 * logits + gap * other).log_softmax(0)
        writer = 2 * logits + age * former
        self.written, self.drawn = writer.log_softmax(0), (writer / temperature).log_softmax(0)

    @property
    def reverse(self) -> float:
        return float((self.p.exp() * (self.p - self.q)).sum())

    def gradient(self, forward: bool = False) -> Tensor:
        """Of the KL, by the student's logits, in closed form."""
        if forward:
            return self.p.exp() - self.q.exp()
        return self.p.exp() * (self.p - self.q - self.reverse)

    def figures(self, estimator: str) -> tuple[float, float, Tensor, float]:
        """Mean and standard deviation of the value; mean of the gradient, and the root of its covariance's trace."""
        leaf = self.p.clone().requires_grad_()
        values = ESTIMATORS[estimator](leaf, self.q, self.drawn, self.written)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
        values = values.detach()
        chances = self.drawn.exp()
        gradients = slopes[:, None] * (torch.eye(OUTCOMES, dtype=torch.float64) - self.p.exp())
        mean, by_logits = float((chances * values).sum()), chances @ gradients
        spread = math.sqrt(float((chances * (values - mean).square()).sum()))
        noise = math.sqrt(float((chances * (gradients - by_logits).square().sum(1)).sum()))
        return mean, spread, by_logits, noise


WHERE = [(0.1, 0.0, 1.0), (2.0, 0.0, 1.0), (0.5, 0.7, 1.0), (0.5, 0.0, 0.7), (0.5, 0.7, 1.3)]


@pytest.mark.parametrize(("gap", "age", "temperature"), WHERE)
@pytest.mark.parametrize("seed", range(3))
def test_which_gradient_each_estimates_without_bias(seed: int, gap: float, age: float, temperature: float) -> None:
    """On text of the current and of an older student, at any temperature."""
    case = Case(seed, gap, age, temperature)
    for name in ("k1", "k2"):
        torch.testing.assert_close(case.figures(name)[2], case.gradient())
    torch.testing.assert_close(case.figures("k3")[2], case.gradient(forward=True))
    assert float((case.figures("k3")[2] - case.gradient()).norm() / case.gradient().norm()) > 0.01
    values = {name: case.figures(name)[0] for name in ("k1", "k2", "k3")}
    assert values["k1"] == pytest.approx(case.reverse) == values["k3"]
    square = float((case.p.exp() * (case.p - case.q).square()).sum()) / 2
    assert values["k2"] == pytest.approx(square) != case.reverse


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_nothing_is_clipped_in_text_of_the_current_student(temperature: float) -> None:
    case = Case(0, 1.0, 0.0, temperature)
    k1, clipped = (case.figures(name) for name in ("k1", "clipped"))
    assert clipped[0] == pytest.approx(k1[0]) and clipped[3] == pytest.approx(k1[3])
    torch.testing.assert_close(clipped[2], k1[2])


def test_clipping_takes_the_gradient_of_tokens_that_have_moved_far_enough() -> None:
    """By hand: s = p / p_rollout of 1.5, 1.5, 0.5, 0.5, 1.1; the cost l is log 2 or -log 2, A its opposite."""
    written = torch.full((5,), 0.2).log()
    moved = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    cost = math.log(2) * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    log_p = (written + moved.log()).requires_grad_()
    losses = clipped_sampled(log_p, log_p.detach() - cost, written, written, clip_range=0.2)
    losses.sum().backward()
    # A > 0 and s > 1.2, or A < 0 and s < 0.8: clipped. The others keep what pulls them back.
    expected = [1.5, -1.2, 0.8, -0.5, -1.1]
    assert losses.tolist() == pytest.approx([math.log(2) * one for one in expected], rel=1e-5)
    assert log_p.grad is not None
    slopes = [math.log(2) * one for one in (1.5, 0.0, 0.0, -0.5, -1.1)]
    assert log_p.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-7)
    # The cost of later tokens turns the sign of the second and third: nothing is clipped there then.
    log_p.grad = None
    later = torch.tensor([0.0, 2.0, -2.0, 0.0, 0.0])
    clipped_sampled(log_p, log_p.detach() - cost, written, written, clip_range=0.2, to_go=later).sum().backward()
    assert log_p.grad is not None
    whole = (moved * (cost + later)).tolist()
    assert log_p.grad.tolist() == pytest.approx([*whole[:2], whole[2], *whole[3:]], rel=1e-5)


def test_an_impossible_sample_gives_finite_numbers() -> None:
    log_p = torch.tensor([-math.inf, -300.0, -0.5], requires_grad=True)
    teacher, drawn = torch.tensor([-1.0, LOG_FLOOR, -1.0]), torch.tensor([-1.0, -1.0, -500.0])
    written = torch.tensor([-1.0, -1.0, -1.0])
    for name, estimator in ESTIMATORS.items():
        losses = estimator(log_p, teacher, drawn, written)
        (gradient,) = torch.autograd.grad(losses.sum(), log_p)
        assert torch.isfinite(losses).all() and torch.isfinite(gradient).all(), name
    assert importance_ratio(log_p, drawn).max() == pytest.approx(math.exp(20))


def test_what_is_refused() -> None:
    one = torch.zeros(1)
    for estimator in (k1_sampled, k2_sampled, k3_sampled):
        with pytest.raises(ValueError, match="ratio_clip is 0"):
            estimator(one, one, one, ratio_clip=0.0)
    for clip_range in (0.0, 1.0):
        with pytest.raises(ValueError, match="clip_range is"):
            clipped_sampled(one, one, one, one, clip_range=clip_range)


# ------------------------------------------------------------------------------ bias and variance, as documented

GAPS, AGES, DRAWS = {"near": 0.1, "far": 1.0}, {"current": 0.0, "older": 0.5}, 200


def row(estimator: str, gap: str, age: str) -> str:
    """A line of the table in docs/losses.md: medians over random cases, as multiples of the exact value and norm."""
    found = []
    for seed in range(DRAWS):
        case = Case(seed, GAPS[gap], AGES[age])
        mean, spread, by_logits, noise = case.figures(estimator)
        exact, size = case.gradient(), float(case.gradient().norm())
        wrong = float((by_logits - exact).norm())
        found.append([abs(mean - case.reverse) / case.reverse, spread / case.reverse, wrong / size, noise / size])
    cells = [f"{one:.2g}" if one > 1e-9 else "0" for one in torch.tensor(found, dtype=torch.float64).median(0).values]
    return f"| {gap} | {age} | `{estimator}` | {' | '.join(cells)} |"


def test_the_documented_biases_and_variances_are_the_computed_ones() -> None:
    described = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    for gap in GAPS:
        for age in AGES:
            for estimator in ESTIMATORS:
                line = row(estimator, gap, age)
                assert line in described, line
