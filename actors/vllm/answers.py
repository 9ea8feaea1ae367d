"""What a server says, as typed values; everything that comes from it is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Finish = Literal["stop", "length", "abort"]
_NO_PROBABILITY = -9000.0  # the server writes -9999 for -inf and for what is not a number


@dataclass(frozen=True, slots=True)
class LabelSpan:
    """Tokens start..end (exclusive) were written by the weights that the server called `label`."""

    label: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """n tokens. tokens: int32 [n]; drawn: float64 [n], the log-probabilities of these tokens; ranks: int64 [n], their
    ranks, from 1. ids: int32 [n, m], the tokens that the server listed, most probable first; -1 where it listed fewer;
    logprobs: float64 [n, m], theirs, -inf there. All are over the whole head at temperature 1. spans cover the tokens.
    """

    tokens: NDArray[np.int32]
    drawn: NDArray[np.float64]
    ranks: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    finish: Finish
    spans: tuple[LabelSpan, ...]


class BadAnswer(ValueError):
    """A server's answer that cannot be used: what was expected, and what came."""


def read_answer(body: Any) -> Answer:
    """The answer to a request for tokens. Raises BadAnswer."""
    try:
        choice = body["choices"][0]
        tokens = [_count(token, "a token id") for token in choice["token_ids"]]
        content = (choice["logprobs"] or {}).get("content") or []
        spans = tuple(_span(one) for one in choice["weight_versions"] or [])
        finish = choice["finish_reason"]
        if len(content) != len(tokens):
            raise BadAnswer(f"{len(content)} tokens with log-probabilities of {len(tokens)}")
        drawn = [_logprob(one["logprob"]) for one in content]
        ranks = [one.get("rank") or 0 for one in content]
        rows = [[(one["token_id"], one["logprob"]) for one in position["top_logprobs"]] for position in content]
    except (LookupError, TypeError, AttributeError) as error:
        raise BadAnswer(f"not vLLM's answer to /inference/v1/generate: {type(error).__name__} {error}") from error
    if finish not in ("stop", "length", "abort"):
        raise BadAnswer(f"finish_reason {finish!r:.40}; known: stop, length, abort")
    _check_spans(spans, len(tokens))
    ids, logprobs = _listed(rows)
    for place, (token, logprob, rank) in enumerate(zip(tokens, drawn, ranks, strict=True)):
        if logprob < _NO_PROBABILITY or rank < 1:
            raise BadAnswer(f"the log-probability of the token {place}, {token}, is not a number, or was not given")
    return Answer(
        np.array(tokens, np.int32),
        np.array(drawn, np.float64),
        np.array(ranks, np.int64),
        ids,
        logprobs,
        finish,
        spans,
    )


def _listed(rows: list[list[tuple[Any, Any]]]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """ids [n, m] and log-probabilities [n, m], in the order of the latter."""
    widest = max(map(len, rows), default=0)
    ids, logprobs = np.full((len(rows), widest), -1, np.int32), np.full((len(rows), widest), -np.inf)
    for row, found in enumerate(rows):
        ids[row, : len(found)] = [_count(token, "a token id") for token, _ in found]
        logprobs[row, : len(found)] = [_logprob(value) for _, value in found]
    # The token that was drawn comes first, whatever its rank.
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def _span(values: Mapping[str, Any]) -> LabelSpan:
    label = values["version"]
    if not isinstance(label, str):
        raise BadAnswer(f"weight_versions: the version {label!r:.40} is not a text")
    return LabelSpan(label, _count(values["start"], "start"), _count(values["end"], "end"))


def _check_spans(spans: tuple[LabelSpan, ...], tokens: int) -> None:
    at = 0
    for one in spans:
        if one.start != at or one.end <= at:
            raise BadAnswer(f"weight_versions: {one.start}..{one.end} after {at}")
        at = one.end
    if at != tokens:
        raise BadAnswer(f"weight_versions: of {at} tokens, and {tokens} were written")


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise BadAnswer(f"{what} is {value!r:.40}")
    return value


def _logprob(value: Any) -> float:
    """Rounded in float32, a log-probability may be above 0 by a little."""
    if type(value) not in (float, int) or not math.isfinite(value) or value > 1e-3:
        raise BadAnswer(f"a log-probability is {value!r:.40}")
    return min(float(value), 0.0)
