"""Return-to-go, against the exact policy gradient of the reverse KL of whole texts in a tiny Markov model.

Four ids, of which 3 ends the text, at most three tokens: all texts are enumerated, and the gradient is by the logits of
each (place, last id). No code is shared but the functions under test, which run as in the learner.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import Loss
from learner.batch import Trajectory, micro_batches
from learner.loss import StudentOutcomes, token_losses
from learner.returns import to_go, with_returns

IDS, STOP, LENGTH, FIRST = 4, 3, 3, 0
Text = tuple[int, ...]


def texts() -> list[Text]:
    """Every text: up to its first STOP, or LENGTH tokens."""
    found = set()
    for ids in itertools.product(range(IDS), repeat=LENGTH):
        end = ids.index(STOP) + 1 if STOP in ids else LENGTH
        found.add(ids[:end])
    return sorted(found)


TEXTS = texts()


def table(seed: int) -> Tensor:
    """Logits [place, last id, id], float64."""
    return torch.randn(LENGTH, IDS, IDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logprobs(logits: Tensor, text: Text) -> Tensor:
    """[n], with graph."""
    log_p, last, found = logits.log_softmax(-1), FIRST, []
    for place, token in enumerate(text):
        found.append(log_p[place, last, token])
        last = token
    return torch.stack(found)


def exact_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """Of sum over texts of P log(P / Q), with the chances of the texts differentiated too."""
    leaf = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        log_p, log_q = token_logprobs(leaf, text).sum(), token_logprobs(teacher, text).sum()
        total = total + log_p.exp() * (log_p - log_q)
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


def ours(student: Tensor, teacher: Tensor, writer: Tensor, **settings: Any) -> Tensor:
    """The mean gradient of the losses of all texts, each with the writer's chance, as a batch."""
    loss = Loss(mode="reverse_kl_sampled", **settings)
    chances = {str(number): float(token_logprobs(writer, text).sum().exp()) for number, text in enumerate(TEXTS)}
    assert sum(chances.values()) == pytest.approx(1)
    batch = []
    for number, text in enumerate(TEXTS):
        n, written = len(text), token_logprobs(writer, text).numpy().astype(np.float32)
        batch.append(
            Trajectory(
                rid=str(number),
                arm="treated",
                prompt=np.array([FIRST], np.int32),
                tokens=np.array(text, np.int32),
                support_ids=np.zeros((n, 0), np.int32),
                teacher_logprobs=np.zeros((n, 1), np.float32),
                teacher_tail=None,
                teacher_sampled=token_logprobs(teacher, text).numpy().astype(np.float32),
                rollout_logprobs=written,
                sampling_logprobs=written,
                oldest_version=0,
            )
        )
    leaf = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    shares = {row.rid: np.full(len(row.tokens), chances[row.rid]) for row in batch}
    whole = sum(float(share.sum()) for share in shares.values())  # by which the mean over kept tokens divides
    for micro in micro_batches(with_returns(batch, loss), max_tokens=40, shares=lambda row: shares[row.rid]):
        log_p = torch.cat([token_logprobs(leaf, TEXTS[int(rid)]) for rid in micro.rids])
        nothing = torch.zeros_like(log_p)
        outcomes = StudentOutcomes(nothing[:, None], None, log_p, nothing, nothing)
        total = total + (micro.weights * token_losses(loss, outcomes, micro)).sum() * whole
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


def brute_force(student: Tensor, teacher: Tensor, horizon: int, discount: float) -> Tensor:
    """Sum over texts and tokens of P(text) grad log p(token) x (its cost and the discounted later ones)."""
    leaf = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        log_p, log_q = token_logprobs(leaf, text), token_logprobs(teacher, text)
        chance = log_p.detach().sum().exp()
        for place in range(len(text)):
            weight = 0.0
            for later in range(place, min(place + horizon, len(text) - 1) + 1):
                weight += discount ** (later - place) * float(log_p[later].detach() - log_q[later])
            total = total + chance * weight * log_p[place]
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


def wrong(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("estimator", ["k1", "clipped"])
@pytest.mark.parametrize("seed", range(3))
def test_with_all_later_tokens_it_is_the_gradient_of_the_divergence_of_whole_texts(seed: int, estimator: str) -> None:
    student, teacher = table(seed), table(seed + 10)
    exact = exact_gradient(student, teacher)
    assert wrong(ours(student, teacher, student, estimator=estimator, horizon="all"), exact) < 1e-6
    assert wrong(ours(student, teacher, student, estimator=estimator, horizon=LENGTH), exact) < 1e-6
    assert wrong(ours(student, teacher, student, estimator=estimator), exact) > 0.05  # that of each place alone


@pytest.mark.parametrize("discount", [1.0, 0.6])
@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_horizon_and_a_discount_count_what_they_say(horizon: int, discount: float) -> None:
    student, teacher = table(1), table(2)
    expected = brute_force(student, teacher, horizon, discount)
    assert wrong(ours(student, teacher, student, horizon=horizon, discount=discount), expected) < 1e-6


def test_in_older_text_the_bias_shrinks_with_the_age() -> None:
    """Own ratio, the writer's later costs and places: exact for the writer itself, wrong by the size of the move."""
    student, teacher, direction = table(3), table(4), table(5)
    exact = exact_gradient(student, teacher)
    found = [wrong(ours(student, teacher, student + age * direction, horizon="all"), exact) for age in (0.1, 0.01, 0.0)]
    assert found[0] < 0.5
    assert found[1] == pytest.approx(found[0] / 10, rel=0.3)
    assert found[2] < 1e-6


def test_values_by_hand() -> None:
    row = Trajectory(
        rid="a",
        arm="treated",
        prompt=np.array([0], np.int32),
        tokens=np.array([1, 2, 1, 2], np.int32),
        support_ids=np.zeros((4, 0), np.int32),
        teacher_logprobs=np.zeros((4, 1), np.float32),
        teacher_tail=None,
        teacher_sampled=np.array([-1, -3, -5, -7], np.float32),
        rollout_logprobs=np.array([-1, -1, -1, -1], np.float32),
        sampling_logprobs=np.zeros(4, np.float32),
        oldest_version=0,
    )  # costs 0, 2, 4, 6
    assert to_go(row, "all", 1.0).tolist() == [12, 10, 6, 0]
    assert to_go(row, "all", 0.5).tolist() == [1 + 1 + 0.75, 2 + 1.5, 3, 0]
    assert to_go(row, 1, 1.0).tolist() == [2, 4, 6, 0]
    assert to_go(row, 2, 0.5).tolist() == [1 + 1, 2 + 1.5, 3, 0]
    assert to_go(row, 4, 1.0).tolist() == to_go(row, 99, 1.0).tolist() == [12, 10, 6, 0]
    for settings in (Loss(), Loss(horizon="all"), Loss(mode="reverse_kl_sampled")):
        assert with_returns([row], settings) == [row]
    (changed,) = with_returns([row], Loss(mode="reverse_kl_sampled", horizon=1))
    assert changed.to_go is not None and changed.to_go.dtype == np.float32
