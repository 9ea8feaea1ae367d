"""The losses against numbers worked by hand, and against slow references that share no code with them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trajectories import STOPS, VOCAB, WIDTH, random_batch, top_support
from whole_logits import log_outcomes, on_support, sampled_logprobs, topk_overlap, whole_outcomes

from common.config import Loss
from learner.batch import Trajectory, micro_batches
from learner.divergences import (
    LOG_FLOOR,
    forward_kl_topk_tail,
    jsd_topk_tail,
    mixed_kl_topk_tail,
    reverse_kl_topk_tail,
)
from learner.loss import Diagnostics, diagnostics, merged, token_losses
from learner.sampled import k1_sampled


def i32(values: list[Any]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def log32(probabilities: list[Any]) -> npt.NDArray[np.float32]:
    return np.log(np.array(probabilities, dtype=np.float32))


# ------------------------------------------------------------------------------ slow references


def slow_outcomes(logits: Tensor, stops: list[int], vocab: int) -> tuple[list[int], Tensor]:
    """Labels (STOP is -1, then the other ids in order) and float64 log-probabilities of one row."""
    scores = logits[:vocab].double()
    total = torch.logsumexp(scores, 0)
    others = [v for v in range(vocab) if v not in stops]
    stop = torch.logsumexp(torch.stack([scores[s] for s in stops]), 0)
    return [-1, *others], torch.stack([stop, *(scores[v] for v in others)]) - total


def slow_full_kl(student: Tensor, teacher: Tensor, stops: list[int], vocab: int) -> Tensor:
    """Reverse KL of one row over the whole vocabulary, stop ids merged, in float64."""
    _, p = slow_outcomes(student, stops, vocab)
    _, q = slow_outcomes(teacher, stops, vocab)
    return (p.exp() * (p - q)).sum()


def slow_coarse_kl(student: Tensor, teacher: Tensor, support: list[int], stops: list[int], vocab: int) -> Tensor:
    """Reverse KL of one row between STOP, `support` and one bucket of all else, in float64."""
    labels, p = slow_outcomes(student, stops, vocab)
    _, q = slow_outcomes(teacher, stops, vocab)
    inside = [i for i, label in enumerate(labels) if label == -1 or label in support]
    outside = [i for i in range(len(labels)) if i not in inside]
    kl = sum((p[i].exp() * (p[i] - q[i]) for i in inside), torch.zeros((), dtype=torch.float64))
    if outside:
        p_tail, q_tail = torch.logsumexp(p[outside], 0), torch.logsumexp(q[outside], 0)
        kl = kl + p_tail.exp() * (p_tail - q_tail)
    return kl


def coarse_kl(student: Tensor, teacher: Tensor, support: Tensor, stops: list[int], vocab: int) -> Tensor:
    """The module's own coarse KL from both models' logits, without a tail where the support is all."""
    has_tail = support.shape[1] + len(stops) < vocab
    q, q_tail = on_support(log_outcomes(teacher, stops, vocab), support, stops[0], has_tail=has_tail)
    p, p_tail = on_support(log_outcomes(student, stops, vocab), support, stops[0], has_tail=has_tail)
    return reverse_kl_topk_tail(p, p_tail, q, q_tail)


def random_case(seed: int, scale: float, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher: scale 1 is broad; 100 is sharp: all but one probability underflow."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, WIDTH, generator=generator) * scale
    teacher = torch.randn(rows, WIDTH, generator=generator) * scale
    teacher[: rows // 2] = student[: rows // 2] + 1e-3 * teacher[: rows // 2]  # a trap: they nearly agree
    return student, teacher


# ------------------------------------------------------------------------------ outcomes


def test_outcomes_by_hand() -> None:
    # Probabilities 1/8, 1/4, 1/8, 1/2 and a padded column that must not count; 0 and 3 stop.
    logits = torch.tensor([[1.0, 2.0, 1.0, 4.0, 1000.0]]).log()
    outcomes = log_outcomes(logits, [3, 0], vocab_size=4)
    assert outcomes.dtype == torch.float32
    torch.testing.assert_close(outcomes.exp(), torch.tensor([[0.0, 0.25, 0.125, 0.625]]))
    assert outcomes[0, 0] == -math.inf

    logprobs, tail = on_support(outcomes, torch.tensor([[1]]), 3, has_tail=True)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.625, 0.25]]))
    assert tail is not None
    torch.testing.assert_close(tail.exp(), torch.tensor([0.125]))

    targets = torch.tensor([0, 1, 3])
    torch.testing.assert_close(
        sampled_logprobs(outcomes.expand(3, 4), targets, [3, 0]).exp(), torch.tensor([0.625, 0.25, 0.625])
    )


def test_one_stop_id_leaves_the_columns_alone() -> None:
    logits, _ = random_case(0, 1.0)
    outcomes = log_outcomes(logits, [4], VOCAB)
    torch.testing.assert_close(outcomes, torch.log_softmax(logits[:, :VOCAB], 1))


def test_half_precision_is_converted_before_the_softmax() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    outcomes = log_outcomes(logits, [0], 1000)
    assert outcomes.dtype == torch.float32
    assert outcomes[0, 7].item() == pytest.approx(-math.log(1000), abs=1e-6)  # bfloat16 would give -6.90625


def test_a_tail_far_below_rounding_is_still_finite() -> None:
    # log(1 - sum) would be log 0 here: the tail's true mass is 2 e^-40.
    logits = torch.tensor([[40.0, 0.0, 0.0, 40.0]])
    _, tail = on_support(log_outcomes(logits, [3], 4), torch.tensor([[0]]), 3, has_tail=True)
    assert tail is not None
    assert tail.item() == pytest.approx(-40.0, abs=1e-5)  # 2 e^-40 of 2: log = -40


@pytest.mark.parametrize(
    ("stops", "vocab", "message"),
    [
        ([], 4, "stop_ids is"),
        ([1, 1], 4, "expected distinct ids below 4"),
        ([4], 4, "expected distinct ids below 4"),
        ([-1], 4, "expected distinct ids below 4"),
        ([1], 6, "logits are 5 wide, the vocabulary 6"),
    ],
)
def test_stop_ids_and_widths_that_are_refused(stops: list[int], vocab: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_outcomes(torch.zeros(1, 5), stops, vocab)


# ------------------------------------------------------------------------------ reverse KL with a tail


def test_reverse_kl_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25]]).log()
    q = torch.tensor([[0.25, 0.25]]).log()
    p_tail, q_tail = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
    # 1/2 log 2 + 1/4 log 1 + 1/4 log 1/2 = 1/4 log 2
    value = reverse_kl_topk_tail(p, p_tail, q, q_tail)
    assert value.tolist() == pytest.approx([0.25 * math.log(2)], rel=1e-6)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.01, 0.3, 1.0, 5.0, 30.0, 100.0]), k=st.integers(0, 9))
def test_between_nothing_and_the_full_vocabulary(seed: int, scale: float, k: int) -> None:
    """Reverse KL with tail and STOP event: >= 0, <= the full-vocabulary value, equal to it without tail."""
    student, teacher = random_case(seed, scale)
    support = top_support(student, k, STOPS, VOCAB)
    values = coarse_kl(student, teacher, support, STOPS, VOCAB)
    assert values.dtype == torch.float32 and torch.isfinite(values).all()
    for row, value in enumerate(values.tolist()):
        full = slow_full_kl(student[row], teacher[row], STOPS, VOCAB).item()
        coarse = slow_coarse_kl(student[row], teacher[row], support[row].tolist(), STOPS, VOCAB).item()
        room = 2e-6 * (1.0 + scale) * max(1e-3, min(1.0, full)) + 1e-5 * full  # rounding of logits of this size
        assert value >= 0.0
        assert value <= full + room
        assert value == pytest.approx(coarse, abs=room)
        if k == VOCAB - len(STOPS):
            assert value == pytest.approx(full, abs=room)


def test_small_divergences_are_exact_in_float32() -> None:
    """A trap is 1e-4 nats and less: the sum of signed terms is off by its rounding there, this one is not."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(200, WIDTH, generator=generator) * 8
    teacher = student + 0.003 * torch.randn(200, WIDTH, generator=generator)
    support = top_support(student, 4, STOPS, VOCAB)
    values = coarse_kl(student, teacher, support, STOPS, VOCAB)
    exact = torch.stack(
        [slow_coarse_kl(s, t, row.tolist(), STOPS, VOCAB) for s, t, row in zip(student, teacher, support, strict=True)]
    )
    assert exact.median() < 3e-6
    torch.testing.assert_close(values.double(), exact, rtol=2e-2, atol=1e-10)


@pytest.mark.parametrize("scale", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("k", [0, 3, VOCAB - len(STOPS)])
def test_gradient_against_the_reference_in_float64(scale: float, k: int) -> None:
    """Gradients against autograd of the reference; with an empty tail that is the full-vocabulary form."""
    student, teacher = random_case(7, scale)
    support = top_support(student, k, STOPS, VOCAB)
    ours = student.clone().requires_grad_()
    coarse_kl(ours, teacher, support, STOPS, VOCAB).sum().backward()
    reference = student.double().requires_grad_()
    for row in range(len(student)):
        if k == VOCAB - len(STOPS):
            slow_full_kl(reference[row], teacher[row], STOPS, VOCAB).backward()
        else:
            slow_coarse_kl(reference[row], teacher[row], support[row].tolist(), STOPS, VOCAB).backward()
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=2e-6 * (1 + scale))
    assert (ours.grad[:, VOCAB:] == 0).all()  # padding of the embedding learns nothing


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = random_case(3, 1.0)
    teacher.requires_grad_()
    support = top_support(student, 3, STOPS, VOCAB)
    values = coarse_kl(student.requires_grad_(), teacher, support, STOPS, VOCAB)
    values.sum().backward()
    assert teacher.grad is None


EXTREMES = {
    "student certain": [[1e4, 0.0, 0.0, 0.0, 0.0]],
    "certain of a stop": [[0.0, 0.0, 0.0, 1e4, 0.0]],
    "all underflow but one, in the tail": [[0.0, 0.0, 1e4, 0.0, 0.0]],
    "logits of -inf in tail and stops": [[0.0, 1.0, -math.inf, -math.inf, -math.inf]],
    "logits of -inf in the support": [[-math.inf, -math.inf, 0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("name", list(EXTREMES))
@pytest.mark.parametrize("has_tail", [True, False])
def test_no_nan_in_value_or_gradient(name: str, has_tail: bool) -> None:
    support = torch.tensor([[0, 1]]) if has_tail else torch.tensor([[0, 1, 2]])
    floor = [LOG_FLOOR] * support.shape[1]
    for teacher in ([-0.1, *floor], [LOG_FLOOR, -0.1, *floor[1:]], [LOG_FLOOR, *floor]):
        logits = torch.tensor(EXTREMES[name], requires_grad=True)
        p, p_tail = on_support(log_outcomes(logits, [3, 4], 5), support, 3, has_tail=has_tail)
        q_tail = torch.tensor([LOG_FLOOR]) if has_tail else None
        value = reverse_kl_topk_tail(p, p_tail, torch.tensor([teacher]), q_tail)
        value.sum().backward()
        assert logits.grad is not None
        assert torch.isfinite(value).all(), value
        assert torch.isfinite(logits.grad).all(), logits.grad


def test_a_tail_on_one_side_only_is_refused() -> None:
    p = torch.tensor([[0.5, 0.5]]).log()
    with pytest.raises(ValueError, match="both have a tail, or neither"):
        reverse_kl_topk_tail(p, None, p, torch.tensor([-3.0]))


# ------------------------------------------------------------------------------ reverse KL of a sample


def test_sampled_loss_by_hand() -> None:
    log_p = torch.tensor([0.5, 0.1]).log().requires_grad_()
    teacher = torch.tensor([0.25, 0.4]).log()
    rollout = torch.tensor([0.25, 0.2]).log()
    # rho = 2 and 1/2; A = log 1/2 and log 4. Value -rho A, gradient with respect to log p the same number.
    expected = [2 * math.log(2), -0.5 * math.log(4)]
    losses = k1_sampled(log_p, teacher, rollout)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert log_p.grad is not None
    assert log_p.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_truncated_ratio_keeps_its_gradient() -> None:
    log_p = torch.tensor([0.5, 0.1]).log().requires_grad_()
    teacher = torch.tensor([0.25, 0.4]).log()
    rollout = torch.tensor([0.25, 0.2]).log()
    losses = k1_sampled(log_p, teacher, rollout, ratio_clip=1.5)
    losses.sum().backward()
    expected = [1.5 * math.log(2), -0.5 * math.log(4)]  # 2 became 1.5; 1/2 stays
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert log_p.grad is not None
    assert log_p.grad.tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="ratio_clip is 0"):
        k1_sampled(log_p, teacher, rollout, ratio_clip=0.0)


def test_sampled_gradient_is_the_full_gradient_in_expectation() -> None:
    """Summed over all outcomes under the distribution that sampled, value and gradient are the exact KL's."""
    student, teacher = random_case(11, 1.0, rows=2)
    behaviour = student + 0.5 * teacher.flip(0)  # another, older student
    student, teacher, behaviour = (logits.double() for logits in (student, teacher, behaviour))
    targets = torch.tensor([v for v in range(VOCAB) if v not in STOPS[1:]])  # each outcome once
    count = len(targets)
    exact = student[1].clone().requires_grad_()
    kl = slow_full_kl(exact, teacher[1], STOPS, VOCAB)
    kl.backward()

    ours = student[1].clone().requires_grad_()
    sampled = [
        sampled_logprobs(log_outcomes(row.expand(count, WIDTH), STOPS, VOCAB), targets, STOPS)
        for row in (ours, teacher[1], behaviour[1])
    ]
    losses = k1_sampled(sampled[0], sampled[1], sampled[2])
    expectation = (sampled[2].exp() * losses).sum()
    expectation.backward()
    torch.testing.assert_close(expectation, kl)
    torch.testing.assert_close(ours.grad, exact.grad)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
def test_sampled_gradient_is_unbiased_at_every_temperature(temperature: float) -> None:
    """Outcomes drawn as the writer draws them, STOP as one, weighted by what they were drawn with."""
    student, teacher = (logits.double() for logits in random_case(12, 1.0, rows=1))
    targets = torch.tensor([v for v in range(VOCAB) if v not in STOPS[1:]])
    exact = student[0].clone().requires_grad_()
    slow_full_kl(exact, teacher[0], STOPS, VOCAB).backward()

    drawn = sampled_logprobs(log_outcomes(student.expand(len(targets), WIDTH), STOPS, VOCAB), targets, STOPS)
    drawn = (drawn / temperature).log_softmax(dim=0)
    ours = student[0].clone().requires_grad_()
    log_p, log_q = (
        sampled_logprobs(log_outcomes(row.expand(len(targets), WIDTH), STOPS, VOCAB), targets, STOPS)
        for row in (ours, teacher[0])
    )
    (drawn.exp() * k1_sampled(log_p, log_q, drawn)).sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad)


def test_a_sample_that_has_become_impossible() -> None:
    log_p = torch.tensor([-math.inf, -300.0, -0.5], requires_grad=True)
    rollout = torch.tensor([-1.0, -1.0, -500.0])  # the last ratio would overflow
    losses = k1_sampled(log_p, torch.tensor([-1.0, LOG_FLOOR, -1.0]), rollout)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert log_p.grad is not None and torch.isfinite(log_p.grad).all()
    assert log_p.grad[:2].tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------ micro-batches


def test_token_losses_by_mode() -> None:
    (micro,) = micro_batches(random_batch(2, [(1, 6)]), max_tokens=100)
    student = whole_outcomes(random_case(2, 2.0)[0], micro, STOPS, VOCAB)
    coarse = (student.logprobs, student.tail, micro.teacher_logprobs, micro.teacher_tail)
    found = {
        settings.mode: token_losses(settings, student, micro)
        for settings in (
            Loss(),
            Loss(mode="forward_kl_topk_tail"),
            Loss(mode="jsd_topk_tail", beta=0.3),
            Loss(mode="mixed", forward_weight=0.3),
            Loss(mode="reverse_kl_sampled", ratio_clip=0.7),
        )
    }
    ratio = (student.sampled - micro.sampling_logprobs).exp().clamp_max(0.7)
    expected = {
        "reverse_kl_topk_tail": reverse_kl_topk_tail(*coarse),
        "forward_kl_topk_tail": forward_kl_topk_tail(*coarse),
        "jsd_topk_tail": jsd_topk_tail(*coarse, beta=0.3),
        "mixed": mixed_kl_topk_tail(*coarse, forward_weight=0.3),
        "reverse_kl_sampled": ratio * (student.sampled - micro.teacher_sampled),
    }
    assert found.keys() == expected.keys() == set(get_args(Loss.model_fields["mode"].annotation))
    for mode, losses in found.items():
        torch.testing.assert_close(losses, expected[mode], msg=mode)


def test_diagnostics_by_hand() -> None:
    row = Trajectory(
        rid="a",
        arm="treated",
        prompt=i32([0]),
        tokens=i32([1, 0]),
        support_ids=i32([[1], [2]]),
        teacher_logprobs=log32([[0.625, 0.25], [0.25, 0.25]]),
        teacher_tail=log32([0.125, 0.5]),
        teacher_sampled=np.zeros(2, np.float32),
        rollout_logprobs=log32([0.5, 0.125]),
        sampling_logprobs=log32([0.25, 0.25]),
        oldest_version=0,
    )
    (micro,) = micro_batches([row], max_tokens=8)
    # Outcomes in both rows: STOP (0 and 3) 5/8, 1: 1/4, 2: 1/8.
    logits = torch.tensor([[1.0, 2.0, 1.0, 4.0]]).log().expand(2, 4).clone().requires_grad_()
    found = diagnostics(whole_outcomes(logits, micro, [3, 0], 4), micro)

    entropy = -(0.625 * math.log(0.625) + 0.25 * math.log(0.25) + 0.125 * math.log(0.125))
    # Row 0 agrees with the teacher. Row 1: STOP 5/8 : 1/4, outcome 2 1/8 : 1/4, tail 1/4 : 1/2.
    kl = 0.625 * math.log(2.5) + 0.125 * math.log(0.5) + 0.25 * math.log(0.5)
    assert found.tokens == 2
    assert found.kl_nats == pytest.approx(kl / 2, rel=1e-5)
    assert found.entropy_nats == pytest.approx(entropy, rel=1e-5)
    assert found.support_mass == pytest.approx((0.875 + 0.75) / 2, rel=1e-5)
    assert found.support_mass_teacher == pytest.approx((0.875 + 0.5) / 2, rel=1e-5)
    assert found.topk_overlap == 0.5  # besides STOP outcome 1 is the likeliest, in both rows
    assert found.ratio_mean == pytest.approx((0.5 + 5.0) / 2, rel=1e-5)  # 1/4 : 1/2 and 5/8 : 1/8
    assert found.ratio_max == pytest.approx(5.0, rel=1e-5)
    assert all(isinstance(value, float) for value in (found.kl_nats, found.ratio_max))


def overlap(logits: Tensor, support: Tensor, stops: list[int], vocab: int) -> list[float]:
    outcomes = log_outcomes(logits, stops, vocab)
    return topk_overlap(outcomes, on_support(outcomes, support, stops[0], has_tail=False)[0]).tolist()


def test_the_overlap_of_supports_by_hand() -> None:
    # Besides STOP (3) the likeliest are 4, 1, 0, 2, in this order.
    logits = torch.tensor([[3.0, 4.0, 1.0, 0.0, 5.0]]).expand(4, 5).clone()
    support = torch.tensor([[4, 1], [1, 0], [0, 2], [2, 4]])
    for stop in (-9.0, 4.5, 9.0):  # after the first two, between them, before them
        logits[:, 3] = stop
        assert overlap(logits, support, [3], 5) == [1.0, 0.5, 0.0, 0.5]
    # STOP and support are all outcomes there are: nothing can leave it.
    assert overlap(logits[:1], torch.tensor([[0, 1, 2, 4]]), [3], 5) == [1.0]


@pytest.mark.parametrize("seed", range(4))
def test_the_overlap_is_the_share_of_common_ids(seed: int) -> None:
    now, then = random_case(seed, 1.0)
    support, likeliest = (top_support(logits, 4, STOPS, VOCAB) for logits in (then, now))
    common = [len(set(a) & set(b)) / 4 for a, b in zip(support.tolist(), likeliest.tolist(), strict=True)]
    assert overlap(now, support, STOPS, VOCAB) == common
    assert overlap(then, support, STOPS, VOCAB) == [1.0] * 6


def test_merged_diagnostics_weight_all_tokens_the_same() -> None:
    first = Diagnostics(1, 4.0, 1.0, 0.5, 0.25, 0.0, ratio_mean=2.0, ratio_max=2.0)
    second = Diagnostics(3, 0.0, 2.0, 1.0, 0.75, 1.0, ratio_mean=1.0, ratio_max=7.0)
    assert merged([first, second]) == Diagnostics(4, 1.0, 1.75, 0.875, 0.625, 0.75, 1.25, 7.0)
    assert merged([second]) == replace(second)
    with pytest.raises(ValueError, match="no tokens"):
        merged([])
