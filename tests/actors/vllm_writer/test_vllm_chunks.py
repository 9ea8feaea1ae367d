"""A server's answer against exact distributions: what a server lists is made here from logits, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.engine.outcomes import FLOOR_NATS, log_outcomes, student_support
from actors.vllm.answers import BadAnswer, read_answer
from actors.vllm.chunks import LEAST_TAIL, UNLISTED, AnswerChunks, Outcomes, chunks_of, unlisted_stop_bound

LABELS = {"v4": 4, "v5": 5}


def logits_of(rows: int, width: int, *, seed: int, scale: float = 3.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(rows, width)) * scale


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def body_of(
    logits: NDArray[np.float64],
    tokens: list[int],
    listed: int,
    *,
    finish: str = "length",
    spans: list[tuple[str, int, int]] | None = None,
) -> dict[str, Any]:
    """What a server answers that draws these tokens: float32 numbers, the token first, then by rank."""
    content = []
    for row, token in zip(log_softmax(logits).astype(np.float32), tokens, strict=True):
        order = np.argsort(-row, kind="stable").tolist()
        rank = order.index(token) + 1
        ids = [token, *(one for one in order[: listed + 1] if one != token)][:listed]
        top = [{"token_id": one, "logprob": max(float(row[one]), -9999.0), "rank": 1} for one in ids]
        content.append({"token_id": token, "logprob": float(row[token]), "rank": rank, "top_logprobs": top})
    versions = [("v4", 0, len(tokens))] if spans is None else spans
    choice = {
        "token_ids": tokens,
        "finish_reason": finish,
        "logprobs": {"content": content},
        "weight_versions": [{"version": label, "start": start, "end": end} for label, start, end in versions if end],
    }
    return {"choices": [choice]}


def written(body: dict[str, Any], outcomes: Outcomes, *, asked: int | None = None, **more: Any) -> AnswerChunks:
    answer = read_answer(body)
    given: dict[str, Any] = {"key": "r1", "start": 7, "last": False, "version_of": LABELS.get, **more}
    return chunks_of(answer, outcomes, asked=len(answer.tokens) if asked is None else asked, **given)


def exact(
    logits: NDArray[np.float64], outcomes: Outcomes
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Support, its log-probabilities with STOP's first, and the tail, over the whole head, in float64."""
    row = log_softmax(logits)
    stop = np.logaddexp.reduce(row[:, outcomes.stop_ids], axis=1)
    rest = row.copy()
    rest[:, outcomes.stop_ids] = -np.inf
    ids = np.argsort(-rest[:, : outcomes.vocab_size], axis=1, kind="stable")[:, : outcomes.support]
    kept = np.take_along_axis(rest, ids, axis=1)
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.logaddexp.reduce(rest, axis=1)
    return ids.astype(np.int32), np.concatenate([stop[:, None], kept], axis=1), tail


@pytest.mark.parametrize("stop_ids", [(3,), (3, 11), (40, 0, 21)])
@pytest.mark.parametrize("seed", range(4))
def test_support_stop_and_tail_are_those_of_the_whole_distribution(stop_ids: tuple[int, ...], seed: int) -> None:
    logits = logits_of(12, 60, seed=seed)
    logits[:, stop_ids[0]] = logits.max(axis=1) - 0.5  # among the listed
    logits[:, stop_ids[1:]] = logits.max(axis=1, keepdims=True) - 1.0
    outcomes = Outcomes(stop_ids, 60, 60, 8)
    tokens = np.random.default_rng(seed).choice([t for t in range(60) if t not in stop_ids], 12).tolist()
    ids, support, tail = exact(logits, outcomes)
    (chunk,) = written(body_of(logits, tokens, outcomes.asked), outcomes).chunks
    assert np.array_equal(chunk.support_ids, ids)
    assert np.allclose(chunk.support_logprobs, support, atol=1e-6)
    assert chunk.tail_logprobs is not None
    assert np.allclose(np.exp(chunk.tail_logprobs), np.exp(tail), atol=1e-6)
    assert np.allclose(chunk.rollout_logprobs, log_softmax(logits)[np.arange(12), tokens], atol=1e-6)
    assert np.array_equal(chunk.sampled_logprobs, chunk.rollout_logprobs)
    assert (chunk.key, chunk.start, chunk.finish, chunk.version) == ("r1", 7, None, 4)
    assert chunk.tokens.tolist() == tokens


def test_the_same_as_the_slots_where_stop_is_listed() -> None:
    logits = logits_of(20, 37, seed=1)
    logits[:, [1, 5]] = logits.max(axis=1, keepdims=True) - 1.0
    outcomes = Outcomes((1, 5), 37, 37, 8)
    row = log_outcomes(torch.from_numpy(logits), [1, 5], 37)
    ids, support, tail = student_support(row, 1, 8, stop_count=2)
    (chunk,) = written(body_of(logits, [2] * 20, outcomes.asked), outcomes).chunks
    assert np.array_equal(chunk.support_ids, ids.numpy())
    assert np.allclose(chunk.support_logprobs, support.numpy(), atol=2e-6)
    assert chunk.tail_logprobs is not None and tail is not None
    assert np.allclose(np.exp(chunk.tail_logprobs), tail.exp().numpy(), atol=2e-6)


def test_a_small_vocabulary_has_no_tail() -> None:
    logits = logits_of(5, 12, seed=2)  # of which 10 are the vocabulary
    logits[:, 10:] = -40.0
    outcomes = Outcomes((1, 2), 10, 12, 64)
    assert outcomes.everything and outcomes.asked == 12
    (chunk,) = written(body_of(logits, [4, 5, 6, 7, 8], outcomes.asked), outcomes).chunks
    assert chunk.tail_logprobs is None
    assert sorted(chunk.support_ids[0].tolist()) == [0, 3, 4, 5, 6, 7, 8, 9]
    assert np.allclose(np.exp(chunk.support_logprobs).sum(axis=1), 1.0, atol=1e-6)


def test_a_token_beyond_the_list_does_not_enter_the_support() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.1, 0.08, 0.06, 0.04, 0.02]]))
    outcomes = Outcomes((6,), 7, 7, 3)
    assert outcomes.asked == 5
    (chunk,) = written(body_of(logits, [5], outcomes.asked), outcomes).chunks
    assert chunk.support_ids.tolist() == [[0, 1, 2]]
    assert chunk.rollout_logprobs[0] == pytest.approx(np.log(0.04), abs=1e-6)
    assert chunk.support_logprobs[0, 0] == UNLISTED
    assert chunk.tail_logprobs is not None
    assert np.exp(chunk.tail_logprobs[0]) == pytest.approx(0.2, abs=1e-6)


def test_any_stop_id_is_the_first_and_ends_the_rollout() -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.2, 0.1]] * 2))
    outcomes = Outcomes((2, 3), 4, 4, 1)
    (chunk,) = written(body_of(logits, [0, 3], outcomes.asked, finish="stop"), outcomes).chunks
    assert chunk.tokens.tolist() == [0, 2]
    assert chunk.finish == "eos"
    assert np.exp(chunk.rollout_logprobs) == pytest.approx([0.5, 0.3], abs=1e-6)  # both stop ids are one outcome


def test_the_last_token_allowed_ends_it_by_length_and_a_stop_there_by_itself() -> None:
    logits = logits_of(3, 20, seed=3)
    outcomes = Outcomes((0,), 20, 20, 4)
    assert written(body_of(logits, [1, 2, 3], 6), outcomes, last=True).chunks[0].finish == "length"
    assert written(body_of(logits, [1, 2, 3], 6), outcomes, last=False).chunks[0].finish is None
    assert written(body_of(logits, [1, 2, 0], 6, finish="stop"), outcomes, last=True).chunks[0].finish == "eos"
    part = written(body_of(logits, [1, 2, 3], 6, finish="abort"), outcomes, last=True, asked=5)
    assert part.chunks[0].finish is None


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.75, 0.88])
def test_the_nucleus_is_the_smallest_set_with_that_mass(top_p: float) -> None:
    logits = np.log(np.array([[0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]] * 2))
    nucleus = {0.3: 0.4, 0.5: 0.65, 0.75: 0.8, 0.88: 0.9}[top_p]
    outcomes = Outcomes((6,), 7, 7, 6, top_p)
    (chunk,) = written(body_of(logits, [0, 0], outcomes.asked), outcomes).chunks
    assert np.exp(chunk.sampled_logprobs) == pytest.approx([0.4 / nucleus] * 2, abs=1e-5)
    assert np.exp(chunk.rollout_logprobs) == pytest.approx([0.4] * 2, abs=1e-6)


def test_a_nucleus_beyond_the_list_is_taken_as_top_p() -> None:
    probabilities = np.array([0.4, 0.2, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04])
    logits, outcomes = np.log(probabilities[None]), Outcomes((7,), 8, 8, 1, 0.8)
    assert outcomes.asked == 3
    for token in (0, 1, 4):  # the last is not among the most probable
        (chunk,) = written(body_of(logits, [token], outcomes.asked), outcomes).chunks
        exact = probabilities[token] / 0.85  # 0.4 + 0.2 + 0.1 + 0.08 + 0.07
        found = float(np.exp(chunk.sampled_logprobs[0]))
        assert found == pytest.approx(probabilities[token] / 0.8, abs=1e-6)
        assert 0 <= found / exact - 1 <= 0.1 / 0.8


def test_of_stop_only_the_ids_in_the_nucleus_are_sampled() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    outcomes = Outcomes((1, 3), 4, 4, 2, 0.7)
    (chunk,) = written(body_of(logits, [1], outcomes.asked, finish="stop"), outcomes).chunks
    assert np.exp(chunk.rollout_logprobs[0]) == pytest.approx(0.35, abs=1e-6)
    assert np.exp(chunk.sampled_logprobs[0]) == pytest.approx(0.3 / 0.8, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_holds_where_stop_is_not_listed(seed: int) -> None:
    """Reverse KL of each token, counted as the arbiter does: STOP, support and tail, against the exact one."""
    draw = np.random.default_rng(seed)
    outcomes = Outcomes((0, 1), 80, 80, 8)
    logits = logits_of(200, 80, seed=seed)
    least = np.sort(logits[:, 2:], axis=1)[:, -outcomes.asked, None]  # that is listed
    logits[:, [0, 1]] = least - draw.uniform(0.01, 3, size=(200, 2))
    logits[:50, 0] = logits[:50].max(axis=1) - 0.5  # of these one stop id is listed
    teacher = logits + draw.normal(size=logits.shape) * draw.choice([0.1, 1.0, 4.0], size=(200, 1))
    ids, support, tail = exact(logits, outcomes)
    own = log_softmax(teacher)
    q_stop = np.logaddexp.reduce(own[:, [0, 1]], axis=1)
    q_kept = np.take_along_axis(own, ids, axis=1)
    rest = own.copy()
    rest[:, [0, 1]] = -np.inf
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    q_tail = np.logaddexp.reduce(rest, axis=1)
    q = np.concatenate([q_stop[:, None], q_kept, q_tail[:, None]], axis=1)
    (chunk,) = written(body_of(logits, [5] * 200, outcomes.asked), outcomes).chunks
    assert ((chunk.support_logprobs[:, 0] == UNLISTED) == (np.arange(200) >= 50)).all()
    assert chunk.tail_logprobs is not None

    def divergence(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((np.exp(p) * (p - q)).sum(axis=1))

    counted = divergence(np.concatenate([chunk.support_logprobs, chunk.tail_logprobs[:, None]], axis=1, dtype=float))
    true = divergence(np.concatenate([support, tail[:, None]], axis=1))
    row = log_softmax(logits)
    unlisted = np.where(np.arange(200) < 50, row[:, 1], support[:, 0])
    bound = unlisted_stop_bound(unlisted, support[:, 0], np.logaddexp(tail, unlisted), q_stop, q_tail)
    rounding = 5e-7 * (1 + np.abs(q).max(axis=1))
    assert (np.abs(counted - true) <= bound + rounding).all()
    assert np.abs(counted - true).max() > 100 * rounding.max()  # so that it is the bound which is tested
    last = np.sort(row, axis=1)[:, -outcomes.asked]
    assert (np.exp(unlisted) <= 2 * np.exp(last) + 1e-9).all()


def test_a_sharp_distribution_has_a_tail_that_counts_as_empty() -> None:
    logits = np.full((1, 50), -30.0)
    logits[0, 4] = 10.0
    outcomes = Outcomes((0,), 50, 50, 8)
    (chunk,) = written(body_of(logits, [4], outcomes.asked), outcomes).chunks
    assert chunk.tail_logprobs is not None
    assert float(np.exp(chunk.tail_logprobs[0])) <= LEAST_TAIL
    assert np.isfinite(chunk.support_logprobs).all()
    assert chunk.support_logprobs.min() >= FLOOR_NATS


def test_columns_of_a_padded_head_are_not_in_the_support() -> None:
    logits = np.log(np.array([[0.3, 0.2, 0.1, 0.02, 0.01, 0.12, 0.25]]))  # 5 tokens, 2 columns of padding
    outcomes = Outcomes((1,), 5, 7, 3)
    assert outcomes.asked == 5
    (chunk,) = written(body_of(logits, [0], outcomes.asked), outcomes).chunks
    assert chunk.support_ids.tolist() == [[0, 2, 3]]  # the last is not listed, and any id will do
    assert chunk.support_logprobs[0, 3] == UNLISTED
    assert chunk.tail_logprobs is not None
    assert np.exp(chunk.tail_logprobs[0]) == pytest.approx(0.4, abs=1e-6)
    with pytest.raises(BadAnswer, match="token 6 is outside the vocabulary of 5"):
        written(body_of(logits, [6], outcomes.asked), outcomes)


def test_a_swap_within_an_answer_makes_two_chunks() -> None:
    logits, outcomes = logits_of(6, 20, seed=5), Outcomes((0,), 20, 20, 4)
    body = body_of(logits, [1, 2, 3, 4, 5, 6], 6, spans=[("v4", 0, 2), ("v5", 2, 6)])
    both = written(body, outcomes, last=True)
    assert [(one.start, one.version, one.finish) for one in both.chunks] == [(7, 4, None), (9, 5, "length")]
    assert np.concatenate([one.tokens for one in both.chunks]).tolist() == [1, 2, 3, 4, 5, 6]
    assert both.refused == 0
    (whole,) = written(body_of(logits, [1, 2, 3, 4, 5, 6], 6), outcomes).chunks
    assert np.array_equal(np.concatenate([one.support_logprobs for one in both.chunks]), whole.support_logprobs)


def test_tokens_of_other_weights_and_all_after_them_are_refused() -> None:
    logits, outcomes = logits_of(6, 20, seed=5), Outcomes((0,), 20, 20, 4)
    body = body_of(logits, [1, 2, 3, 4, 5, 0], 6, finish="stop", spans=[("v4", 0, 2), ("default", 2, 4), ("v5", 4, 6)])
    found = written(body, outcomes)
    assert [(one.start, one.tokens.tolist(), one.finish) for one in found.chunks] == [(7, [1, 2], None)]
    assert found.refused == 4


def test_nothing_written_is_no_chunk() -> None:
    empty = body_of(np.zeros((0, 20)), [], 6, finish="abort", spans=[])
    assert written(empty, Outcomes((0,), 20, 20, 4), asked=5) == AnswerChunks([], 0)


def choice_of() -> dict[str, Any]:
    found: dict[str, Any] = body_of(logits_of(3, 20, seed=6), [1, 2, 3], 6)["choices"][0]
    return found


def without_a_token(choice: dict[str, Any]) -> None:
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()
    choice["weight_versions"][0]["end"] = 2


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no tokens": lambda choice: choice.pop("token_ids"),
    "no logprobs": lambda choice: choice.update(logprobs=None),
    "a token is a text": lambda choice: choice["token_ids"].__setitem__(0, "1"),
    "a token is huge": lambda choice: choice["token_ids"].__setitem__(0, 1 << 40),
    "not a number": lambda choice: choice["logprobs"]["content"][0].update(logprob=-9999.0),
    "no rank": lambda choice: choice["logprobs"]["content"][0].update(rank=None),
    "above 1": lambda choice: choice["logprobs"]["content"][0]["top_logprobs"][0].update(logprob=0.5),
    "a span is short": lambda choice: choice["weight_versions"][0].update(end=2),
    "no spans": lambda choice: choice.update(weight_versions=None),
    "spans overlap": lambda choice: choice["weight_versions"].append({"version": "v5", "start": 1, "end": 3}),
    "an unknown ending": lambda choice: choice.update(finish_reason="error"),
    "a stop that is none": lambda choice: choice.update(finish_reason="stop"),
    "too short": without_a_token,
    "beyond a stop": lambda choice: choice["token_ids"].__setitem__(1, 0),
}


@pytest.mark.parametrize("change", DAMAGE)
def test_an_answer_that_cannot_be_right_is_refused(change: str) -> None:
    choice = choice_of()
    assert len(written({"choices": [choice]}, Outcomes((0,), 20, 20, 4), asked=3).chunks) == 1
    DAMAGE[change](choice)
    with pytest.raises(BadAnswer):
        written({"choices": [choice]}, Outcomes((0,), 20, 20, 4), asked=3)


@pytest.mark.parametrize("body", [{"choices": []}, {"text": "hello"}, [], None, "hello"])
def test_an_answer_of_something_else_is_refused(body: Any) -> None:
    with pytest.raises(BadAnswer):
        read_answer(body)
