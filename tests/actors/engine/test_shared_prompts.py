"""The prompt of a group of rollouts is computed once, by decoder and scorer, and what is written is the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from actors.engine import ClosedChunk, Scored, ScoreRequest, SlotModel
from tests.actors.engine.test_engine import (
    assert_written,
    close,
    completion_of,
    decoder,
    prompt_of,
    qwen3,
    scorer,
    slow_rows,
    support_of,
)

PROMPT = 11


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return qwen3(seed=3)


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of every forward without logits or states: those of prefills."""
    counts: list[int] = []
    forward, states = SlotModel.forward, SlotModel.states

    def counting(self: SlotModel, rows: Any, tokens: Any, starts: Any, lengths: Any, logits_at: Any) -> Any:
        if len(logits_at) == 0:
            counts.append(int(lengths.sum()))
        return forward(self, rows, tokens, starts, lengths, logits_at)

    def not_counted(self: SlotModel, *args: Any) -> Any:
        known = len(counts)
        found = states(self, *args)
        del counts[known:]
        return found

    monkeypatch.setattr(SlotModel, "forward", counting)
    monkeypatch.setattr(SlotModel, "states", not_counted)
    yield counts


def write(engine: Any, keys: list[str]) -> dict[str, list[ClosedChunk]]:
    chunks: dict[str, list[ClosedChunk]] = {key: [] for key in keys}
    while engine.busy:
        for chunk in engine.step():
            chunks[chunk.key].append(chunk)
    return chunks


def test_a_group_is_written_from_one_prefill(model: PreTrainedModel, forwarded: list[int]) -> None:
    engine = decoder(model, slots=4, prefill_tokens=64)
    for seed in range(4):
        engine.add(str(seed), prompt_of(PROMPT), seed=seed, max_new_tokens=12)
    chunks = write(engine, list("0123"))
    assert sum(forwarded) == PROMPT - 1
    for key, written in chunks.items():
        assert_written(model, prompt_of(PROMPT), int(key), written)


def test_a_prompt_longer_than_a_prefill_is_waited_for(model: PreTrainedModel, forwarded: list[int]) -> None:
    engine = decoder(model, slots=2, prefill_tokens=4)
    for seed in range(2):
        engine.add(str(seed), prompt_of(PROMPT), seed=seed, max_new_tokens=6)
    chunks = write(engine, ["0", "1"])
    assert sum(forwarded) == PROMPT - 1 and max(forwarded) <= 4
    for key, written in chunks.items():
        assert_written(model, prompt_of(PROMPT), int(key), written)


def test_a_slot_that_became_free_still_gives_its_prompt(model: PreTrainedModel, forwarded: list[int]) -> None:
    engine = decoder(model, slots=1, prefill_tokens=64)
    for seed in range(3):
        engine.add(str(seed), prompt_of(PROMPT), seed=seed, max_new_tokens=5)
        assert_written(model, prompt_of(PROMPT), seed, write(engine, [str(seed)])[str(seed)])
    assert len(forwarded) == 3  # its own slot: `add` starts it anew, and there is no other to copy from


def test_other_prompts_in_a_slot_are_not_mistaken_for_the_first(model: PreTrainedModel) -> None:
    engine = decoder(model, slots=2, prefill_tokens=64)
    for turn in range(6):  # each slot's text is replaced again and again
        for place in range(2):
            seed = 2 * turn + place
            engine.add(str(seed), prompt_of(PROMPT, seed % 3), seed=seed, max_new_tokens=4 + place)
        chunks = write(engine, [str(2 * turn), str(2 * turn + 1)])
        for key, written in chunks.items():
            assert_written(model, prompt_of(PROMPT, int(key) % 3), int(key), written)


def test_a_prompt_read_by_other_weights_is_not_shared(model: PreTrainedModel, forwarded: list[int]) -> None:
    engine = decoder(qwen3(seed=3), slots=2, prefill_tokens=64)
    engine.add("old", prompt_of(PROMPT), seed=1, max_new_tokens=20)
    engine.step()
    engine.close_chunks()
    other = qwen3(seed=4)
    engine.swap(other.state_dict())
    engine.add("new", prompt_of(PROMPT), seed=2, max_new_tokens=6)
    written = write(engine, ["old", "new"])["new"]
    assert forwarded == [PROMPT - 1, PROMPT - 1]
    assert_written(other, prompt_of(PROMPT), 2, written)


def test_what_a_failed_rollout_left_is_not_shared(model: PreTrainedModel) -> None:
    engine = decoder(model, slots=2, prefill_tokens=64)
    engine.add("bad", prompt_of(PROMPT), seed=1, max_new_tokens=20)
    engine.step()
    engine.discard("bad")
    engine.add("next", prompt_of(PROMPT), seed=2, max_new_tokens=6)
    engine.add("other", prompt_of(PROMPT), seed=3, max_new_tokens=6)
    chunks = write(engine, ["next", "other"])
    assert_written(model, prompt_of(PROMPT), 2, chunks["next"])
    assert_written(model, prompt_of(PROMPT), 3, chunks["other"])


def request(key: str, *, start: int = 0, length: int = 6) -> ScoreRequest:
    completion = completion_of(20, int(key))
    return ScoreRequest(
        key=key,
        prompt=prompt_of(PROMPT),
        start=start,
        tokens=completion[start : start + length],
        support_ids=support_of(length, int(key)),
        prefix=completion[:start] if start else None,
    )


def assert_scored(model: PreTrainedModel, asked: ScoreRequest, scored: Scored) -> None:
    rows = slow_rows(model, prompt_of(PROMPT), completion_of(20, int(asked.key)))
    for place, ids in enumerate(asked.support_ids):
        close(scored.teacher_logprobs[place, 1:], rows[asked.start + place, ids])


def test_a_group_is_scored_from_one_prefill(model: PreTrainedModel, forwarded: list[int]) -> None:
    engine = scorer(model, slots=4, prefill_tokens=64)
    first = [request(key) for key in "012"]
    for asked, scored in zip(first, engine.score(first), strict=True):
        assert_scored(model, asked, scored)
    later = [request("3"), request("0", start=6)]
    for asked, scored in zip(later, engine.score(later), strict=True):
        assert_scored(model, asked, scored)
    assert sum(forwarded) == PROMPT - 1
    assert engine.rebuilt_tokens == 0
