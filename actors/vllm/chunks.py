"""From a server's answer to chunks: support, STOP, tail, and how likely each token was as it was sampled.

A server lists the most probable *tokens*; an outcome of ours is a token, except that all stop ids are one outcome,
STOP. Three things are therefore not exact:

STOP. The probability u of stop ids that are not listed is not known: it is counted into the tail. STOP has none
    (`UNLISTED`) where none of its ids is listed. The server's list ends at p_last, so u <= |U| · p_last; the reverse
    KL of such a token differs from the exact one by at most u (1 + |log(p_t / q_t)| + |log(q_s / p_s)|), where p_t is
    the tail with u in it, p_s STOP's exact probability and q the teacher (`unlisted_stop_bound`).
Tail. 1 minus the sum of what is listed, of numbers that the server rounded to float32: below `LEAST_TAIL` it counts as
    empty (`UNLISTED`). It contains what a padded head puts on columns beyond the vocabulary.
Nucleus. With top_p < 1 the mass of the nucleus is summed over the list; where the list does not reach top_p, it is
    taken as top_p, less than the exact mass by at most the probability of the last listed token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.engine.decode import ClosedChunk, Finish
from actors.engine.outcomes import support_size
from actors.vllm.answers import Answer, BadAnswer

UNLISTED = -100.0
"""Log-probability of what counts as impossible: its exp is 0 beside anything else, and it is finite on the wire."""

LEAST_TAIL = 1e-9

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Of a run: stop_ids, U; vocab_size: what an output head has beyond it is never drawn; head_size: logits of the
    student's head; top_k: K at most; top_p: of sampling."""

    stop_ids: tuple[int, ...]
    vocab_size: int
    head_size: int
    top_k: int
    top_p: float = 1.0

    @property
    def support(self) -> int:
        """K."""
        return support_size(self.top_k, self.vocab_size, len(self.stop_ids))

    @property
    def everything(self) -> bool:
        """Whether the support is everything, so that there is no tail."""
        return self.vocab_size - len(self.stop_ids) <= self.support

    @property
    def asked(self) -> int:
        """How many tokens a server is to list: K besides all stop ids, and the token that was drawn, which takes the
        last place where it is none of these."""
        return self.head_size if self.everything else min(self.support + len(self.stop_ids) + 1, self.head_size)


@dataclass(frozen=True, slots=True)
class AnswerChunks:
    """What an answer adds to a rollout. refused: tokens at its end that nobody may use, since weights wrote them that
    are not of this run."""

    chunks: list[ClosedChunk]
    refused: int


def chunks_of(
    answer: Answer,
    outcomes: Outcomes,
    *,
    key: str,
    start: int,
    asked: int,
    last: bool,
    version_of: Callable[[str], int | None],
) -> AnswerChunks:
    """The chunks of an answer, one for each set of weights that wrote some of it.

    `start`: index of the first token in the completion. `asked`: tokens that the request was for; `last`: whether the
    rollout is as long as it may be after these. `version_of`: the version of a server's label, None for weights that
    are not of this run. Raises BadAnswer.
    """
    _check(answer, outcomes, asked)
    columns = _columns(answer, outcomes)
    chunks: list[ClosedChunk] = []
    for span in answer.spans:
        version = version_of(span.label)
        if version is None:  # what follows was drawn after these tokens
            return AnswerChunks(chunks, len(answer.tokens) - span.start)
        ends = span.end == len(answer.tokens)
        finish: Finish | None = None
        if ends and answer.tokens[-1] in outcomes.stop_ids:
            finish = "eos"
        elif ends and last and span.end == asked:
            finish = "length"
        chunks.append(columns.chunk(span.start, span.end, key=key, start=start, finish=finish, version=version))
    return AnswerChunks(chunks, 0)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Of an answer's tokens: what chunks are cut from."""

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    support: NDArray[np.float32]
    tail: NDArray[np.float32] | None
    rollout: NDArray[np.float32]
    sampled: NDArray[np.float32]

    def chunk(self, at: int, end: int, *, key: str, start: int, finish: Finish | None, version: int) -> ClosedChunk:
        return ClosedChunk(
            key=key,
            start=start + at,
            tokens=self.tokens[at:end].copy(),
            support_ids=self.ids[at:end].copy(),
            support_logprobs=self.support[at:end].copy(),
            tail_logprobs=None if self.tail is None else self.tail[at:end].copy(),
            rollout_logprobs=self.rollout[at:end].copy(),
            sampled_logprobs=self.sampled[at:end].copy(),
            finish=finish,
            version=version,
        )


def _check(answer: Answer, outcomes: Outcomes, asked: int) -> None:
    count = len(answer.tokens)
    if count > asked:
        raise BadAnswer(f"{count} tokens for a request of {asked}")
    if count and (largest := int(answer.tokens.max())) >= outcomes.vocab_size:
        raise BadAnswer(f"token {largest} is outside the vocabulary of {outcomes.vocab_size}")
    stops = np.flatnonzero(np.isin(answer.tokens, outcomes.stop_ids))
    if len(stops) and stops[0] != count - 1:
        raise BadAnswer(f"{count - 1 - int(stops[0])} tokens after a stop id")
    if answer.finish == "stop" and not len(stops):
        raise BadAnswer("finish_reason stop without a stop id of the run at the end")
    if answer.finish == "length" and count < asked:
        raise BadAnswer(f"finish_reason length after {count} of {asked} tokens: the server's --max-model-len is short")


def _columns(answer: Answer, outcomes: Outcomes) -> _Columns:
    listed = (answer.ids >= 0) & (answer.ids < outcomes.vocab_size)
    stops = np.isin(answer.ids, outcomes.stop_ids)
    mass = np.where(listed, np.exp(answer.logprobs), 0.0)
    stop = _log((mass * stops).sum(axis=1))
    ids, logprobs = _support(answer, listed & ~stops, outcomes)
    support = np.concatenate([stop[:, None], logprobs], axis=1)
    drawn_stop = np.isin(answer.tokens, outcomes.stop_ids)
    rollout = np.where(drawn_stop, stop, answer.drawn)
    sampled = rollout if outcomes.top_p >= 1 else _truncated(answer, stops, drawn_stop, outcomes.top_p)
    rest = 1.0 - np.exp(support).sum(axis=1)
    tail = np.where(rest > LEAST_TAIL, np.log(np.maximum(rest, LEAST_TAIL)), UNLISTED)
    return _Columns(
        tokens=np.where(drawn_stop, outcomes.stop_ids[0], answer.tokens).astype(np.int32),
        ids=ids,
        support=support.astype(np.float32),
        tail=None if outcomes.everything else tail.astype(np.float32),
        rollout=rollout.astype(np.float32),
        sampled=sampled.astype(np.float32),
    )


def _log(mass: _Numbers) -> _Numbers:
    """log of probabilities, those of 0 as UNLISTED, at most 0."""
    logs: _Numbers = np.full(mass.shape, UNLISTED)
    logs[mass > 0] = np.log(mass[mass > 0]).clip(UNLISTED, 0.0)
    return logs


def _support(answer: Answer, outcome: NDArray[np.bool_], outcomes: Outcomes) -> tuple[NDArray[np.int32], _Numbers]:
    """The first K listed tokens that are an `outcome` of each row: ids int32 [n, K], log-probabilities [n, K].

    Where fewer are listed, which takes columns of a padded head among the most probable, the support is filled with
    tokens that are not, as UNLISTED: their probability stays in the tail.
    """
    k = outcomes.support
    order = np.argsort(~outcome, axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(answer.ids, order, axis=1)
    logprobs = np.take_along_axis(answer.logprobs, order, axis=1).clip(UNLISTED)
    found = np.take_along_axis(outcome, order, axis=1)
    if ids.shape[1] < k:
        missing = ((0, 0), (0, k - ids.shape[1]))
        ids, logprobs, found = (np.pad(one, missing) for one in (ids, logprobs, found))
    for row in np.flatnonzero(~found.all(axis=1)):
        places = np.flatnonzero(~found[row])
        taken = {*answer.ids[row].tolist(), *outcomes.stop_ids}
        free = (token for token in range(outcomes.vocab_size) if token not in taken)
        ids[row, places] = [next(free) for _ in places]
        logprobs[row, places] = UNLISTED
    return ids, logprobs


def _truncated(answer: Answer, stops: NDArray[np.bool_], drawn_stop: NDArray[np.bool_], top_p: float) -> _Numbers:
    """Log-probabilities of the outcomes drawn, float64 [n], from the smallest set of tokens with mass >= top_p."""
    mass = np.exp(answer.logprobs)
    # A token that was drawn and is none of the most probable is listed all the same: between them others are missing.
    gap = answer.ranks > answer.ids.shape[1]
    drawn = answer.ids == answer.tokens[:, None]
    in_order = np.where(gap[:, None] & drawn, 0.0, mass)
    before = in_order.cumsum(axis=1) - in_order
    nucleus = (before < top_p) | drawn
    total = in_order.sum(axis=1)
    inside = np.where(total < top_p, top_p, (in_order * (before < top_p)).sum(axis=1))
    outcome = np.where(drawn_stop[:, None], stops & nucleus, drawn)
    return np.minimum(_log((mass * outcome).sum(axis=1)) - np.log(inside), 0.0)


def unlisted_stop_bound(
    unlisted: _Numbers, stop: _Numbers, tail: _Numbers, teacher_stop: _Numbers, teacher_tail: _Numbers
) -> _Numbers:
    """The most by which the reverse KL of a token with unlisted stop ids differs from the exact one, in nats, [n].

    All are logs of probabilities: `unlisted`, u, of the stop ids that are not listed; `stop`, p_s, of STOP exactly;
    `tail`, p_t, of the tail with u in it; `teacher_stop` and `teacher_tail`, q_s and q_t. The difference is
    (p_t - u) log(p_t / (p_t - u)) - (p_s - u) log(p_s / (p_s - u)) + u log(p_t / q_t) + u log(q_s / p_s): the first
    two terms have opposite signs, and each is at most u.
    """
    bound: _Numbers = np.exp(unlisted) * (1 + np.abs(tail - teacher_tail) + np.abs(teacher_stop - stop))
    return bound
