"""Divergence of student and teacher on one token: exact KL between two coarse distributions. Pure numpy.

And the entropy of the student's coarse distribution, H_t = - Σ_{v∈S} p(v) log p(v) - p_tail log p_tail.

S is STOP and the student's top K other outcomes; the rest of each distribution is folded into one tail:

    d_t = Σ_{v∈S} p(v) log(p(v)/q(v)) + p_tail log(p_tail/q_tail)

(arXiv 2606.09471, top-K estimate of reverse KL; with the tail bucket it is itself a KL.) It is never negative, never
above the full-vocabulary KL, and equal to it if the tail is empty.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def coarse_reverse_kl(
    student: Floats, teacher: Floats, student_tail: Floats | None, teacher_tail: Floats | None
) -> Floats:
    """Reverse KL per token over the support and the tail bucket.

    Args:
        student, teacher: log-probabilities on the support, float32 [n, K + 1] (column 0 is STOP), nats.
        student_tail, teacher_tail: log-probabilities of all other outcomes together, float32 [n]; both None where the
            support holds every outcome.

    Returns:
        float32 [n], nats, ≥ 0.

    Raises:
        ValueError: shapes that do not fit, or one tail without the other.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"support: student {student.shape} and teacher {teacher.shape} must be one shape [n, K + 1]")
    if (student_tail is None) != (teacher_tail is None):
        raise ValueError("tail: student and teacher must both have one or both have none")
    log_p, log_q = student.astype(np.float64), teacher.astype(np.float64)
    if student_tail is not None and teacher_tail is not None:
        log_p = np.concatenate([log_p, student_tail.astype(np.float64)[:, None]], axis=1)
        log_q = np.concatenate([log_q, teacher_tail.astype(np.float64)[:, None]], axis=1)
    p, q = np.exp(log_p), np.exp(log_q)
    # Both sum to one only up to rounding. p log(p/q) - p + q is never negative term by term and adds up to the same
    # where they do, so a sharp case cannot come out at -1e-8.
    terms = p * (log_p - log_q) - p + q
    divergence: Floats = np.maximum(terms, 0.0).sum(axis=1).astype(np.float32)
    return divergence


def coarse_entropy(logprobs: Floats, tail: Floats | None) -> Floats:
    """Entropy per token of a distribution over STOP, the support and the tail bucket: never above the full
    vocabulary's, and equal to it if the tail is empty or one outcome.

    Args:
        logprobs: on the support, float32 [n, K + 1] (column 0 is STOP), nats.
        tail: of all other outcomes together, float32 [n]; None where the support holds every outcome.

    Returns:
        float32 [n], nats, ≥ 0.
    """
    log_p = logprobs.astype(np.float64)
    if tail is not None:
        log_p = np.concatenate([log_p, tail.astype(np.float64)[:, None]], axis=1)
    # Rounding can put a log-probability slightly above zero, and the sum of a sharp case below.
    entropy: Floats = np.maximum(-(np.exp(log_p) * log_p).sum(axis=1), 0.0).astype(np.float32)
    return entropy
