"""The reward's term: value and gradient in float64 against a slow reference, whole and in pieces."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import make_config
from torch import Tensor
from trajectories import STOPS, VOCAB, WIDTH, random_batch

from common.pretrained import Pair
from learner.batch import MicroBatch, Trajectory, micro_batches
from learner.gradients import add_gradients
from learner.head import LinearHead
from learner.loss import StudentOutcomes
from learner.reward import reward_losses
from learner.sharded import packed, unpacked

SIZES = [(3, 5), (1, 9), (4, 2), (2, 2), (6, 7), (1, 1)]
HIDDEN = 6


def batch() -> list[Trajectory]:
    return [replace(one, advantage=(-1.5, 0.0, 0.5)[place % 3]) for place, one in enumerate(random_batch(3, SIZES))]


def slow_log_p(logits: Tensor, token: int) -> Tensor:
    """Of the sampled outcome, from one row of float64 logits."""
    total = torch.logsumexp(logits[:VOCAB], 0)
    ids = STOPS if token in STOPS else [token]
    return torch.logsumexp(logits[ids], 0) - total


def slow_loss(rows: Tensor, head: Tensor, batch: list[Trajectory], weight: float, clip: float | None) -> Tensor:
    """-weight rho A log p, rho and its clip detached, over the kept tokens: a mean; its gradient is the term's."""
    total, count, at = torch.zeros((), dtype=torch.float64), sum(len(one.tokens) for one in batch), 0
    for one in batch:
        for place, token in enumerate(one.tokens.tolist()):
            log_p = slow_log_p(rows[at] @ head.T, token)
            ratio = math.exp(log_p.item() - float(one.sampling_logprobs[place]))
            ratio = ratio if clip is None else min(ratio, clip)
            total = total - weight * ratio * one.advantage * log_p / count
            at += 1
    return total


class Fixed:
    """Rows and head of a model that is only these."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        tokens = sum(n for _, n in SIZES)
        self.rows = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
        self.layer = torch.nn.Linear(HIDDEN, WIDTH, bias=False, dtype=torch.float64)
        torch.nn.init.normal_(self.layer.weight, generator=generator)


def in_double(micro: MicroBatch) -> MicroBatch:
    held = {name: getattr(micro, name) for name in micro.__slots__}
    return MicroBatch(
        **{
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in held.items()
        }
    )


def gradients_of(model: Fixed, mode: str, clip: float | None) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients of a learner's step with and without the reward: the difference is the term's."""
    pair: Any = Pair(None, None, tuple(STOPS), VOCAB)  # type: ignore[arg-type]
    found = []
    for reward in ("grpo", "none"):
        config = make_config(
            Path("/nowhere"),
            data={"num_generations": 2},
            loss={"mode": mode, "ratio_clip": clip},
            reward={"mode": reward, "weight": 0.75},
        )
        (micro,) = micro_batches(batch(), max_tokens=1000)
        model.rows.grad = model.layer.weight.grad = None
        loss, _ = add_gradients(
            lambda _: model.rows,
            LinearHead(model.layer),
            [in_double(micro)],
            config,
            pair,
            device="cpu",
            busy=contextlib.nullcontext,
            between=lambda: None,
        )
        assert model.rows.grad is not None and model.layer.weight.grad is not None
        found.append((loss, model.rows.grad.clone(), model.layer.weight.grad.clone()))
    (with_loss, *with_), (without_loss, *without) = found
    return with_loss - without_loss, with_[0] - without[0], with_[1] - without[1]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["reverse_kl_topk_tail", "forward_kl_topk_tail", "mixed", "reverse_kl_sampled"])
@pytest.mark.parametrize("piece_rows", [4, 256])
def test_a_steps_gradient_gains_exactly_the_policy_gradient(
    mode: str, clip: float | None, piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.pieces.PIECE_ROWS", piece_rows)
    model = Fixed()
    value, by_rows, by_head = gradients_of(model, mode, clip)
    ordered = sorted(batch(), key=lambda one: (-one.length, one.rid))
    rows, head = model.rows.detach().requires_grad_(), model.layer.weight.detach().requires_grad_()
    slow_loss(rows, head, ordered, 0.75, clip).backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None and head.grad is not None
    torch.testing.assert_close(by_rows, rows.grad, rtol=1e-6, atol=1e-9)  # weights and advantages are float32
    torch.testing.assert_close(by_head, head.grad, rtol=1e-6, atol=1e-9)
    ratios = []
    kept = [(one, place) for one in ordered for place in range(len(one.tokens))]
    for at, (one, place) in enumerate(kept):
        log_p = slow_log_p(model.rows[at].detach() @ model.layer.weight.detach().T, int(one.tokens[place])).item()
        ratio = math.exp(log_p - float(one.sampling_logprobs[place]))
        ratios.append((ratio if clip is None else min(ratio, clip)) * one.advantage)
    assert value == pytest.approx(-0.75 * sum(ratios) / len(ratios), rel=1e-6)


def outcomes(sampled: Tensor) -> StudentOutcomes:
    empty = torch.zeros(len(sampled), 1, dtype=sampled.dtype)
    return StudentOutcomes(empty, None, sampled, empty[:, 0], empty[:, 0])


def test_at_every_temperature_its_mean_is_the_gradient_of_the_mean_reward() -> None:
    """Over outcomes drawn at a temperature, the expectation of the term's gradient is that of -sum p r, exactly."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda z: -(z.softmax(0) * rewards).sum(), logits)
    for temperature in (0.5, 1.0, 2.0):
        drawn = (logits / temperature).log_softmax(0)
        z = logits.clone().requires_grad_()
        held: Any = replace(micro_batches(random_batch(0, [(1, 5)]), max_tokens=100)[0], sampling_logprobs=drawn)
        held = replace(held, advantages=rewards)
        losses = reward_losses(outcomes(z.log_softmax(0)), held, 1.0)
        (drawn.exp() * losses).sum().backward()
        assert z.grad is not None
        torch.testing.assert_close(z.grad, exact, rtol=1e-9, atol=1e-12)


def test_an_advantage_of_zero_adds_nothing_at_all() -> None:
    (micro,) = micro_batches(random_batch(0, [(2, 4)]), max_tokens=100)
    sampled = torch.full((4,), -1.0).requires_grad_()
    losses = reward_losses(outcomes(sampled), micro, 3.0)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist() == [0.0] * 4
    assert sampled.grad is not None and sampled.grad.tolist() == [0.0] * 4


def test_a_clip_that_is_no_number_above_zero_is_refused() -> None:
    (micro,) = micro_batches(random_batch(0, [(2, 1)]), max_tokens=100)
    with pytest.raises(ValueError, match="ratio_clip is 0"):
        reward_losses(outcomes(torch.zeros(1)), micro, 1.0, ratio_clip=0)


def test_each_token_has_its_trajectorys_advantage_on_every_rank() -> None:
    micros = micro_batches(batch(), max_tokens=20)
    by_rid = {one.rid: one.advantage for one in batch()}
    for micro in unpacked(packed(micros)):
        lengths = [len(next(one for one in batch() if one.rid == rid).tokens) for rid in micro.rids]
        expected = [by_rid[rid] for rid, n in zip(micro.rids, lengths, strict=True) for _ in range(n)]
        assert micro.advantages.tolist() == expected
        assert micro.only(slice(1, 2)).advantages.tolist() == expected[1:2]


def test_an_advantage_that_is_not_a_number_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="trajectory r0: advantage is nan"):
        replace(batch()[0], advantage=math.nan)
