"""The divergence per token against the full-vocabulary KL in float64, and by hand."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from common.divergence import coarse_entropy, coarse_reverse_kl
from common.wire.messages import ScoreDivergence

VOCABULARY, STOPS = 40, (3, 7, 11)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def merged(log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Outcomes: STOP first, with the stop tokens' mass, then every other token."""
    others = [token for token in range(log_p.shape[1]) if token not in STOPS]
    stop = np.logaddexp.reduce(log_p[:, list(STOPS)], axis=1)
    return np.concatenate([stop[:, None], log_p[:, others]], axis=1)


def full_kl(log_p: npt.NDArray[np.float64], log_q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result


Side = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]


def sides(k: int, student: npt.NDArray[np.float64], *others: npt.NDArray[np.float64]) -> list[Side]:
    """Support of STOP and the student's top K, and the tail as log-sum-exp, in float32, as workers send them."""
    order = 1 + np.argsort(-student[:, 1:], axis=1)
    chosen = np.concatenate([np.zeros((len(student), 1), np.int64), order[:, :k]], axis=1)
    rest = order[:, k:]

    def side(log: npt.NDArray[np.float64]) -> Side:
        support = np.take_along_axis(log, chosen, axis=1).astype(np.float32)
        tail = np.logaddexp.reduce(np.take_along_axis(log, rest, axis=1), axis=1).astype(np.float32)
        return support, tail if rest.shape[1] else None

    return [side(log) for log in (student, *others)]


def coarse(log_p: npt.NDArray[np.float64], log_q: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float32]:
    (student, student_tail), (teacher, teacher_tail) = sides(k, log_p, log_q)
    return coarse_reverse_kl(student, teacher, student_tail, teacher_tail)


def random_pair(scale: float, n: int = 200) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rng = np.random.default_rng(int(scale * 10))
    student = rng.normal(size=(n, VOCABULARY)) * scale
    teacher = student + rng.normal(size=(n, VOCABULARY)) * min(scale, 2.0)
    return merged(log_softmax(student)), merged(log_softmax(teacher))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("k", [0, 1, 4, 16, 36])
def test_it_is_never_negative_and_never_above_the_full_kl(scale: float, k: int) -> None:
    log_p, log_q = random_pair(scale)
    found = coarse(log_p, log_q, k)
    full = full_kl(log_p, log_q)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    assert (found <= full * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_it_is_the_full_kl_where_nothing_is_left_in_the_tail(scale: float) -> None:
    log_p, log_q = random_pair(scale)
    found = coarse(log_p, log_q, VOCABULARY - len(STOPS))
    np.testing.assert_allclose(found, full_kl(log_p, log_q), rtol=1e-4, atol=1e-6)


def test_a_larger_support_comes_closer() -> None:
    log_p, log_q = random_pair(1.0)
    means = [float(coarse(log_p, log_q, k).mean()) for k in (0, 2, 8, 20, 36)]
    assert means == sorted(means)
    assert means[0] < 0.9 * means[-1]


def test_which_stop_token_a_model_prefers_does_not_matter() -> None:
    """The student ends with one id, the teacher with another: token by token 20 nats apart, as outcomes the same."""
    student, teacher = np.zeros((1, VOCABULARY)), np.zeros((1, VOCABULARY))
    student[0, 3] = teacher[0, 11] = 20.0
    assert full_kl(log_softmax(student), log_softmax(teacher))[0] > 19
    assert coarse(merged(log_softmax(student)), merged(log_softmax(teacher)), 8)[0] < 1e-6


def logs(*rows: list[float]) -> npt.NDArray[np.float32]:
    return np.log(np.array(rows, np.float64)).astype(np.float32)


def test_numbers_by_hand() -> None:
    # p = (1/2, 1/4 | 1/4), q = (1/4, 1/4 | 1/2): 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2.
    found = coarse_reverse_kl(logs([0.5, 0.25]), logs([0.25, 0.25]), logs([0.25])[0], logs([0.5])[0])
    assert found.tolist() == pytest.approx([0.25 * math.log(2)], rel=1e-6)
    # Without a tail: p = (3/4, 1/4), q = (1/4, 3/4): 1/2 ln 3.
    assert coarse_reverse_kl(logs([0.75, 0.25]), logs([0.25, 0.75]), None, None)[0] == pytest.approx(
        0.5 * math.log(3), rel=1e-6
    )


def test_equal_distributions_diverge_by_nothing() -> None:
    log_p, _ = random_pair(3.0)
    assert coarse(log_p, log_p, 8).max() == 0.0


@pytest.mark.parametrize("margin", [20.0, 40.0, 100.0])
def test_sharp_distributions_stay_finite_and_do_not_go_below_zero(margin: float) -> None:
    """Here 1 - Σ p of rounded values would be zero or negative; the tails are sums of their own."""
    rng = np.random.default_rng(1)
    student = rng.normal(size=(500, VOCABULARY))
    student[np.arange(500), rng.integers(0, VOCABULARY, 500)] += margin
    teacher = student + rng.normal(size=student.shape)
    log_p, log_q = merged(log_softmax(student)), merged(log_softmax(teacher))
    found = coarse(log_p, log_q, 8)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found <= full_kl(log_p, log_q) * 1.001 + 1e-6).all()
    ScoreDivergence(0, found).encode()


def test_a_trap_of_1e_4_nats_is_told_from_nothing() -> None:
    # p = (1 - e, e), q = (1 - 2e, 2e) with e = 1e-3: KL = (1-e) ln((1-e)/(1-2e)) - e ln 2 = 3.0755e-4 nats.
    e = 1e-3
    by_hand = (1 - e) * math.log((1 - e) / (1 - 2 * e)) - e * math.log(2)
    found = coarse_reverse_kl(logs([1 - e]), logs([1 - 2 * e]), logs([e])[0], logs([2 * e])[0])
    assert found[0] == pytest.approx(by_hand, rel=1e-3)


def test_an_outcome_at_the_floor_counts_as_having_no_probability() -> None:
    floor = np.float32(-1e4)
    student = np.array([[0.0, floor]], np.float32)
    assert coarse_reverse_kl(student, student, None, None).tolist() == [0.0]
    teacher = np.array([[np.log(0.5), np.log(0.5)]], np.float32)
    assert coarse_reverse_kl(student, teacher, None, None)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    two = np.zeros((3, 2), np.float32)
    tail = np.zeros(3, np.float32)
    for student, teacher in [(two, two[:2]), (two, np.zeros((3, 3), np.float32)), (two[0], two[0])]:
        with pytest.raises(ValueError, match="one shape"):
            coarse_reverse_kl(student, teacher, None, None)
    for tails in [(tail, None), (None, tail)]:
        with pytest.raises(ValueError, match="both"):
            coarse_reverse_kl(two, two, *tails)
    with pytest.raises(ValueError, match="must match"):  # numpy's own words
        coarse_reverse_kl(two, two, tail[:2], tail[:2])


def test_no_tokens_give_no_numbers() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert coarse_reverse_kl(empty, empty, None, None).shape == (0,)


# --- entropy ---


def test_entropy_is_that_of_the_coarse_distribution_and_never_above_the_whole() -> None:
    log_p, _ = random_pair(3.0)
    whole = -(np.exp(log_p) * log_p).sum(axis=1)
    [part], [all_of_it] = sides(8, log_p), sides(log_p.shape[1] - 1, log_p)
    found = coarse_entropy(*part)
    assert found.dtype == np.float32
    assert (found <= whole + 1e-6).all() and (found > 0).all() and found.mean() < 0.99 * whole.mean()
    assert all_of_it[1] is None
    assert coarse_entropy(*all_of_it).tolist() == pytest.approx(whole.tolist(), rel=1e-5)


def test_entropy_by_hand() -> None:
    # (1/2, 1/4 | 1/4): 1/2 ln 2 + 2 · 1/4 ln 4 = 3/2 ln 2; without a tail (3/4, 1/4): 2 ln 2 - 3/4 ln 3.
    assert coarse_entropy(logs([0.5, 0.25]), logs([0.25])[0]).tolist() == pytest.approx([1.5 * math.log(2)], rel=1e-6)
    two = coarse_entropy(logs([0.75, 0.25]), None)
    assert two.tolist() == pytest.approx([2 * math.log(2) - 0.75 * math.log(3)], rel=1e-6)
    floor = np.float32(-1e4)  # an outcome without probability; and rounding that puts one slightly above zero
    assert coarse_entropy(np.array([[0.0, floor], [1e-7, floor]], np.float32), None).tolist() == [0.0, 0.0]
    assert coarse_entropy(np.zeros((0, 3), np.float32), None).shape == (0,)
