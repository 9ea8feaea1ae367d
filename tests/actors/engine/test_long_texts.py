"""A text longer than a forward is forwarded in pieces, and other rollouts are written and scored between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from actors.engine import Scored, ScoreRequest, SlotModel
from tests.actors.engine.test_engine import (
    alone,
    assert_scored,
    assert_written,
    collect,
    decoder,
    long_seed,
    prompt_of,
    qwen3,
    request,
    scorer,
    whole,
)

PIECE = 7


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return qwen3(seed=3)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens, padding included, of every forward of more than one column."""
    sizes: list[int] = []
    forward = SlotModel.forward

    def counting(self: SlotModel, rows: Any, tokens: Any, *args: Any) -> Any:
        if tokens.shape[1] > 1:
            sizes.append(tokens.size)
        return forward(self, rows, tokens, *args)

    monkeypatch.setattr(SlotModel, "forward", counting)
    yield sizes


def test_others_are_written_while_a_resumed_rollout_is_read(model: PreTrainedModel, pieces: list[int]) -> None:
    prompt = prompt_of(6)
    seed = long_seed(model, prompt, 16)
    full = alone(model, prompt, seed)
    pieces.clear()
    engine = decoder(model, prefill_tokens=PIECE)
    engine.add("other", prompt_of(2, seed=9), seed=long_seed(model, prompt_of(2, seed=9), 12), max_new_tokens=20)
    engine.step()
    pieces.clear()
    engine.add("long", prompt, seed=seed, max_new_tokens=20, generated=np.array(whole(full)[:14], np.int32))
    written: dict[str, Any] = {}
    steps = -(-(6 + 14 - 1) // PIECE)
    for step in range(1, steps):
        before = engine.decoded_tokens
        collect(written, engine.step())
        assert engine.decoded_tokens == before + 1, "the other's token"
        assert pieces == [PIECE] * step
    while engine.busy:
        collect(written, engine.step())
    assert max(pieces) == PIECE
    assert whole(written["long"]) == whole(full)[14:]


def in_turn(engine: Any, requests: list[ScoreRequest]) -> list[list[Scored | None]]:
    """Answers call by call, until all are scored; what is scored is not asked again."""
    calls = []
    while requests:
        answers = engine.score_in_turn(requests)
        calls.append(answers)
        requests = [one for one, answer in zip(requests, answers, strict=True) if answer is None]
        assert len(calls) < 50
    return calls


def test_a_long_text_is_scored_after_others_and_in_pieces(model: PreTrainedModel, pieces: list[int]) -> None:
    engine = scorer(model, prefill_tokens=PIECE)
    engine.score([request("b", 0, 3)])
    pieces.clear()
    long, other = request("a", 20, 24, prefix=True), request("b", 3, 6)
    first, *calls = in_turn(engine, [long, other])
    assert first[0] is None
    assert first[1] is not None
    assert_scored(model, other, first[1])
    missing = len(long.prompt) + 20 - 1
    assert len(calls) == -(-missing // PIECE) - 1, "a piece a call, and the last one with the chunk"
    assert calls[-1][0] is not None
    assert_scored(model, long, calls[-1][0])
    assert max(pieces) == PIECE
    assert engine.rebuilt_tokens == missing, "each token once"


def test_a_long_text_keeps_its_slot_while_others_come(model: PreTrainedModel) -> None:
    """Two slots, and in every call another rollout that has none yet."""
    engine = scorer(model, prefill_tokens=PIECE)
    long = request("a", 20, 24, prefix=True)
    *others, last = "bcdefghijk"[: -(-(len(long.prompt) + 20 - 1) // PIECE)]
    for key in others:
        answer, other = engine.score_in_turn([long, request(key, 0, 3)])
        assert answer is None
        assert other is not None
    answer, _ = engine.score_in_turn([long, request(last, 0, 3)])
    assert answer is not None
    assert_scored(model, long, answer)


def test_chunks_of_one_long_text_wait_together(model: PreTrainedModel) -> None:
    engine = scorer(model, prefill_tokens=PIECE)
    asked = [request("a", 15, 18, prefix=True), request("a", 18, 22)]
    *calls, last = in_turn(engine, asked)
    assert all(answers == [None, None] for answers in calls)
    for one, answer in zip(asked, last, strict=True):
        assert answer is not None
        assert_scored(model, one, answer)


def test_a_long_prompt_of_a_group_is_read_once(model: PreTrainedModel) -> None:
    engine = scorer(model, slots=3, prefill_tokens=PIECE)
    group = [replace(request(key, 0, 3), prompt=prompt_of(19)) for key in "abc"]
    calls = in_turn(engine, group)
    ready = [[one is not None for one in answers] for answers in calls]
    pieces = -(-18 // PIECE)
    assert ready == [[False] * 3] * (pieces - 1) + [[True, False, False], [True, True]]


def test_a_text_that_one_forward_holds_does_not_wait(model: PreTrainedModel) -> None:
    engine = scorer(model, prefill_tokens=64)
    asked = [request("a", 20, 24, prefix=True), request("b", 0, 3)]
    for one, answer in zip(asked, engine.score_in_turn(asked), strict=True):
        assert answer is not None
        assert_scored(model, one, answer)
    assert engine.score_in_turn([]) == []


def test_a_long_text_without_its_prefix_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(KeyError, match="a"):
        scorer(model, prefill_tokens=PIECE).score_in_turn([request("a", 20, 24)])


def test_a_resumed_rollout_has_its_log_probabilities(model: PreTrainedModel) -> None:
    prompt = prompt_of(6)
    seed = long_seed(model, prompt, 12)
    full = alone(model, prompt, seed, chunk_tokens=40)
    engine = decoder(model, prefill_tokens=PIECE, chunk_tokens=40)
    engine.add("r", prompt, seed=seed, max_new_tokens=20, generated=full[0].tokens[:10])
    (rest,) = [chunk for _ in range(40) if engine.busy for chunk in engine.step()]
    assert np.allclose(rest.rollout_logprobs, full[0].rollout_logprobs[10:], atol=1e-5)
    assert_written(model, prompt, seed, full)
