"""The divergences against float64 references in numpy, value and gradient, and what they are known to satisfy.

The references share no code with them: plain sums over outcomes, differentiated by complex step (Squire & Trapp, SIAM
Review 40(1), 1998), which has no rounding of differences: the derivative of f at x is Im f(x + ih) / h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trajectories import STOPS, VOCAB, WIDTH, top_support
from whole_logits import log_outcomes, on_support

from common.config import Loss
from learner import pieces
from learner.batch import MicroBatch
from learner.divergences import (
    LOG_FLOOR,
    forward_kl_topk_tail,
    jsd_topk_tail,
    mixed_kl_topk_tail,
    reverse_kl_topk_tail,
)
from learner.head import WholeHead
from learner.loss import StudentOutcomes, token_losses
from learner.pieces import backward_in_pieces

Complex = npt.NDArray[np.complex128]
MODES = [
    Loss(mode="reverse_kl_topk_tail"),
    Loss(mode="forward_kl_topk_tail"),
    Loss(mode="jsd_topk_tail", beta=0.0),
    Loss(mode="jsd_topk_tail", beta=0.1),
    Loss(mode="jsd_topk_tail", beta=0.5),
    Loss(mode="jsd_topk_tail", beta=0.97),
    Loss(mode="jsd_topk_tail", beta=1.0),
    Loss(mode="mixed", forward_weight=0.0),
    Loss(mode="mixed", forward_weight=0.35),
    Loss(mode="mixed", forward_weight=1.0),
]
of_mode = st.sampled_from(MODES)
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda one: f"{one.mode} {one.beta:g} {one.forward_weight:g}")


# ------------------------------------------------------------------------------ the references


def log_sum(values: Complex) -> Any:
    top = values.real.max()
    return np.log(np.exp(values - top).sum()) + top


def coarse_log(logits: Complex, groups: list[list[int]]) -> Complex:
    """Log-probabilities of groups of ids: STOP, each id of the support, all others."""
    total = log_sum(logits[[place for group in groups for place in group]])
    return np.array([log_sum(logits[group]) - total for group in groups])


def slow_kl(log_a: Complex, log_b: Complex) -> Any:
    return (np.exp(log_a) * (log_a - log_b)).sum()


def slow_divergence(mode: Loss, log_p: Complex, log_q: Complex) -> Any:
    """As in the papers; p is the student, q the teacher."""
    if mode.mode == "reverse_kl_topk_tail" or (mode.mode == "jsd_topk_tail" and mode.beta == 1):
        return slow_kl(log_p, log_q)
    if mode.mode == "forward_kl_topk_tail" or (mode.mode == "jsd_topk_tail" and mode.beta == 0):
        return slow_kl(log_q, log_p)
    if mode.mode == "mixed":
        return mode.forward_weight * slow_kl(log_q, log_p) + (1 - mode.forward_weight) * slow_kl(log_p, log_q)
    both = np.stack([log_q + np.log(mode.beta), log_p + np.log(1 - mode.beta)])
    log_m = np.array([log_sum(column) for column in both.T])
    return mode.beta * slow_kl(log_q, log_m) + (1 - mode.beta) * slow_kl(log_p, log_m)


def reference(mode: Loss, student: Any, teacher: Any, groups: list[list[int]]) -> tuple[float, npt.NDArray[Any]]:
    """Value, and gradient by the student's logits, of one row."""
    log_q = coarse_log(teacher.astype(np.complex128), groups)
    step = 1e-30
    value = slow_divergence(mode, coarse_log(student.astype(np.complex128), groups), log_q)
    gradient = np.zeros(len(student))
    for place in range(len(student)):
        moved = student.astype(np.complex128)
        moved[place] += step * 1j
        gradient[place] = slow_divergence(mode, coarse_log(moved, groups), log_q).imag / step
    return float(value.real), gradient


def groups_of(support: list[int], stops: list[int]) -> list[list[int]]:
    rest = [v for v in range(VOCAB) if v not in stops and v not in support]
    return [list(stops), *([v] for v in support), *([rest] if rest else [])]


# ------------------------------------------------------------------------------ cases


def logits_of(seed: int, scale: float, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Of student and teacher, float64 [rows, WIDTH]; in half of the rows they nearly agree."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64) * scale).unbind()
    teacher[: rows // 2] = student[: rows // 2] + 1e-3 * teacher[: rows // 2]
    return student, teacher


def micro_of(teacher: Tensor, support: Tensor, stops: list[int], dtype: torch.dtype) -> MicroBatch:
    rows = len(teacher)
    has_tail = support.shape[1] + len(stops) < VOCAB
    logprobs, tail = on_support(log_outcomes(teacher, stops, VOCAB), support, stops[0], has_tail=has_tail)
    nothing = torch.zeros(rows, dtype=dtype)
    return MicroBatch(
        rids=("r",),
        input_ids=torch.zeros(1, rows + 1, dtype=torch.long),
        logit_mask=torch.ones(1, rows + 1, dtype=torch.bool),
        targets=torch.arange(rows) % VOCAB,
        support_ids=support,
        teacher_logprobs=logprobs.to(dtype),
        teacher_tail=None if tail is None else tail.to(dtype),
        teacher_sampled=nothing,
        rollout_logprobs=nothing,
        sampling_logprobs=nothing,
        to_go=nothing,
        advantages=nothing,
        weights=torch.linspace(0.5, 1.5, rows, dtype=dtype),
    )


def of_logits(
    mode: Loss, student: Tensor, teacher: Tensor, support: Tensor, stops: list[int], dtype: torch.dtype
) -> tuple[float, Tensor]:
    """Weighted sum of the losses, and its gradient by the student's logits, as the learner computes them."""
    micro = micro_of(teacher, support, stops, dtype)
    rows = student.detach().clone().to(dtype).requires_grad_()
    total, _ = backward_in_pieces(
        WholeHead(), rows, micro, lambda p, m: token_losses(mode, p, m), stop_ids=stops, vocab_size=VOCAB
    )
    assert rows.grad is not None
    return total.item(), rows.grad


def coarse(mode: Callable[..., Tensor], student: Tensor, teacher: Tensor, support: Tensor, **options: float) -> Tensor:
    has_tail = support.shape[1] + len(STOPS) < VOCAB
    p, p_tail, q, q_tail = (
        part
        for logits in (student, teacher)
        for part in on_support(log_outcomes(logits, STOPS, VOCAB), support, STOPS[0], has_tail=has_tail)
    )
    assert p is not None and q is not None
    return mode(p, p_tail, q, q_tail, **options)


@settings(max_examples=200, deadline=None)
@given(
    mode=of_mode,
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.01, 0.3, 1.0, 5.0, 30.0]),
    support=st.integers(0, VOCAB),
    stops=st.sampled_from([STOPS[:1], STOPS[:2], STOPS]),
    rows_of_a_piece=st.sampled_from([2, 256]),
)
def test_value_and_gradient_against_the_reference(
    mode: Loss, seed: int, scale: float, support: int, stops: list[int], rows_of_a_piece: int
) -> None:
    """With padded heads, one to three stop ids, with and without a tail, in one piece and in several."""
    student, teacher = logits_of(seed, scale)
    size = min(support, VOCAB - len(stops))
    ids = top_support(student if seed % 2 else teacher, size, stops, VOCAB)
    expected, by_logits = 0.0, torch.zeros_like(student)
    for row, weight in enumerate(np.linspace(0.5, 1.5, len(student)).tolist()):
        groups = groups_of(ids[row].tolist(), stops)
        value, gradient = reference(mode, student[row].numpy(), teacher[row].numpy(), groups)
        expected += weight * value
        by_logits[row] = weight * torch.from_numpy(gradient)
    largest = by_logits.abs().max().item()

    former, pieces.PIECE_ROWS = pieces.PIECE_ROWS, rows_of_a_piece
    try:
        exact = of_logits(mode, student, teacher, ids, stops, torch.float64)
        rounded = of_logits(mode, student, teacher, ids, stops, torch.float32)
    finally:
        pieces.PIECE_ROWS = former
    assert exact[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(exact[1], by_logits, rtol=1e-8, atol=1e-11)
    # Rounding the logits to float32 alone moves log-probabilities by 1e-7 times their size; a gradient p (log p/q - KL)
    # at p near 1 is the difference of two ratios of that size (in 20,000 draws at most 0.63 of this room).
    room = 2e-5 * (1 + scale)
    assert rounded[0] == pytest.approx(expected, rel=10 * room, abs=room)
    torch.testing.assert_close(rounded[1].double(), by_logits, rtol=1e-4, atol=room * (1 + largest))
    for gradient in (exact[1], rounded[1]):
        assert (gradient[:, VOCAB:] == 0).all()  # padding of the head learns nothing


@each_mode
def test_small_divergences_and_their_gradients_are_exact_in_float32(mode: Loss) -> None:
    """In a trap they are 1e-4 nats and less, where sums of terms of both signs are all rounding."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(60, WIDTH, generator=generator) * 8
    teacher = student + 0.003 * torch.randn(60, WIDTH, generator=generator)
    ids = top_support(student, 4, STOPS, VOCAB)
    values, exact, wrong = [], [], []
    for row in range(60):
        value, gradient = reference(
            mode, student[row].double().numpy(), teacher[row].double().numpy(), groups_of(ids[row].tolist(), STOPS)
        )
        found = of_logits(mode, student[row, None], teacher[row, None], ids[row, None], STOPS, torch.float32)
        values.append(found[0] / 0.5)  # the weight of a single row
        exact.append(value)
        scale = np.abs(gradient).max()
        wrong.append(float(np.abs(found[1][0].double().numpy() / 0.5 - gradient).max() / scale) if scale > 1e-9 else 0)
    assert np.median(exact) < 3e-6
    assert min(values) >= 0
    assert values == pytest.approx(exact, rel=2e-2, abs=1e-10)
    assert np.median(wrong) < 2e-3


@settings(max_examples=100, deadline=None)
@given(mode=of_mode, seed=st.integers(0, 2**20), scale=st.sampled_from([0.3, 3.0, 100.0]), k=st.integers(0, 9))
def test_never_negative_and_never_above_the_value_over_all_outcomes(
    mode: Loss, seed: int, scale: float, k: int
) -> None:
    student, teacher = (logits.float() for logits in logits_of(seed, scale))
    ids = top_support(student, k, STOPS, VOCAB)
    everything = top_support(student, VOCAB - len(STOPS), STOPS, VOCAB)
    some, whole = (
        token_losses(mode, outcomes(student, one), micro_of(teacher, one, STOPS, torch.float32))
        for one in (ids, everything)
    )
    assert (some >= 0).all() and torch.isfinite(some).all()
    assert (some <= whole * (1 + 1e-4) + 2e-6 * (1 + scale)).all()


def outcomes(student: Tensor, ids: Tensor) -> StudentOutcomes:
    has_tail = ids.shape[1] + len(STOPS) < VOCAB
    logprobs, tail = on_support(log_outcomes(student, STOPS, VOCAB), ids, STOPS[0], has_tail=has_tail)
    nothing = torch.zeros(len(student))
    return StudentOutcomes(logprobs, tail, nothing, nothing, nothing)


# ------------------------------------------------------------------------------ by hand, and at the ends


P, Q = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
P_TAIL, Q_TAIL = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()


def test_by_hand() -> None:
    # q: 1/4, 1/4, 1/2 against p: 1/2, 1/4, 1/4. 1/4 log 1/2 + 0 + 1/2 log 2 = 1/4 log 2; so is the reverse.
    quarter = 0.25 * math.log(2)
    assert forward_kl_topk_tail(P, P_TAIL, Q, Q_TAIL).tolist() == pytest.approx([quarter], rel=1e-6)
    for weight in (0.0, 0.4, 1.0):
        mixed = mixed_kl_topk_tail(P, P_TAIL, Q, Q_TAIL, forward_weight=weight)
        assert mixed.tolist() == pytest.approx([quarter], rel=1e-6)
    # beta 1/2: m is 3/8, 1/4, 3/8; both KLs are 1/2 log 4/3 + 1/4 log 2/3.
    half = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert jsd_topk_tail(P, P_TAIL, Q, Q_TAIL, beta=0.5).tolist() == pytest.approx([half], rel=1e-6)
    # beta 1/4, m = q/4 + 3p/4: 7/16, 1/4, 5/16.
    by_q = 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)
    by_p = 0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)
    found = jsd_topk_tail(P, P_TAIL, Q, Q_TAIL, beta=0.25)
    assert found.tolist() == pytest.approx([0.25 * by_q + 0.75 * by_p], rel=1e-6)


def test_the_ends_of_jsd_are_both_kls_and_its_limits_their_multiples() -> None:
    student, teacher = logits_of(5, 2.0)
    ids = top_support(student, 4, STOPS, VOCAB)
    forward, reverse = (coarse(one, student, teacher, ids) for one in (forward_kl_topk_tail, reverse_kl_topk_tail))
    assert (coarse(jsd_topk_tail, student, teacher, ids, beta=0.0) == forward).all()
    assert (coarse(jsd_topk_tail, student, teacher, ids, beta=1.0) == reverse).all()
    for small in (1e-3, 1e-6, 1e-9):
        first = coarse(jsd_topk_tail, student, teacher, ids, beta=small) / small
        last = coarse(jsd_topk_tail, student, teacher, ids, beta=1 - small) / small
        # The next term of beta -> 0 is of the size of beta times the chi-squared divergence.
        torch.testing.assert_close(first, forward, rtol=30 * small + 1e-6, atol=0.0)
        torch.testing.assert_close(last, reverse, rtol=30 * small + 1e-6, atol=0.0)
    swapped = coarse(jsd_topk_tail, teacher, student, ids, beta=0.2)
    torch.testing.assert_close(coarse(jsd_topk_tail, student, teacher, ids, beta=0.8), swapped)


@pytest.mark.parametrize("beta", [1e-9, 1e-4, 0.5, 1 - 1e-9])
def test_no_nan_where_one_of_them_is_certain(beta: float) -> None:
    sure, other = torch.tensor([[0.0, LOG_FLOOR, -math.inf]]), torch.tensor([[LOG_FLOOR, 0.0, LOG_FLOOR]])
    for log_p, log_q in ((sure, other), (other, sure), (sure, sure)):
        log_p = log_p.clone().requires_grad_()
        for value in (
            jsd_topk_tail(log_p, None, log_q, None, beta=beta),
            mixed_kl_topk_tail(log_p, None, log_q, None, forward_weight=beta),
        ):
            value.sum().backward()
            assert torch.isfinite(value).all() and value.item() >= 0
            assert log_p.grad is not None and torch.isfinite(log_p.grad).all()


def test_what_the_support_does_not_list_is_what_forward_kl_loses() -> None:
    """The KL over all outcomes is that over support and tail and, times the teacher's mass outside, that inside it."""
    student, teacher = logits_of(8, 2.0)
    ids = top_support(student, 3, STOPS, VOCAB)
    everything = top_support(student, VOCAB - len(STOPS), STOPS, VOCAB)
    whole, some = (coarse(forward_kl_topk_tail, student, teacher, one) for one in (everything, ids))
    lost = []
    for row in range(len(student)):
        rest = [v for v in range(VOCAB) if v not in STOPS and v not in ids[row].tolist()]
        within_p, within_q = (logits[row, rest].log_softmax(dim=0) for logits in (student, teacher))
        mass = teacher[row, :VOCAB].softmax(dim=0)[rest].sum()
        lost.append(mass * (within_q.exp() * (within_q - within_p)).sum())
    assert max(lost) > 0.05
    torch.testing.assert_close(whole - some, torch.stack(lost))


def test_what_is_refused() -> None:
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            jsd_topk_tail(P, P_TAIL, Q, Q_TAIL, beta=beta)
        with pytest.raises(ValueError, match="expected 0 to 1"):
            mixed_kl_topk_tail(P, P_TAIL, Q, Q_TAIL, forward_weight=beta)
    for one in (reverse_kl_topk_tail, forward_kl_topk_tail):
        with pytest.raises(ValueError, match="both have a tail, or neither"):
            one(P, None, Q, Q_TAIL)
