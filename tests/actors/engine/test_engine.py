"""The engine against plain full forwards: slots, batch-mates, chunks and resumption change no number.

References are slow and independent: one row at a time, no cache, float64 from the logits on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    FalconMambaConfig,
    Gemma3ForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoConfig,
    GraniteConfig,
    GraniteForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.engine.attention import ONE_QUERY, UnsupportedModelError, check_attention
from actors.engine.decode import ClosedChunk, Decoder
from actors.engine.outcomes import uniforms
from actors.engine.proof import self_test
from actors.engine.score import Scorer
from actors.engine.scored import Scored, ScoreRequest
from actors.engine.slots import (
    SlotCache,
    SlotLayer,
    SlotModel,
    padded,
    rectangles,
)

VOCAB, WIDTH = 23, 24  # the output head is one wider than the vocabulary
STOPS = (3, 7)
TOP_K = 5
SHAPE: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # distributions far from uniform
    "pad_token_id": 0,
}
Ints = NDArray[np.int32]


def ready(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)
    return model


def qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return ready(Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 8} | changes)))


def llama() -> PreTrainedModel:
    torch.manual_seed(1)
    return ready(LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 4})))


def gemma() -> PreTrainedModel:
    """Tied embeddings, one key head."""
    torch.manual_seed(2)
    return ready(GemmaForCausalLM(GemmaConfig(**SHAPE | {"head_dim": 8, "num_key_value_heads": 1})))


def granite() -> PreTrainedModel:
    """Logits are scaled behind the output head."""
    torch.manual_seed(4)
    scaled = {"logits_scaling": 3.0, "attention_multiplier": 0.4}
    return ready(GraniteForCausalLM(GraniteConfig(**SHAPE | scaled)))


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return qwen3()


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return qwen3(seed=9)


def prompt_of(length: int, seed: int = 0) -> Ints:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).astype(np.int32)


# --- references ---


def slow_rows(model: PreTrainedModel, prompt: Ints, completion: Ints, stops: Sequence[int] = STOPS) -> NDArray[Any]:
    """Log-probabilities of outcomes at each completion token, float64 [n, VOCAB], other stop columns -inf."""
    text = torch.from_numpy(np.concatenate([prompt, completion])[None].astype(np.int64))
    with torch.no_grad():
        logits: Any = model(input_ids=text, use_cache=False).logits
    x = logits[0, len(prompt) - 1 : -1, :VOCAB].double().numpy()
    x = x - x.max(axis=1, keepdims=True)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    p[:, stops[0]] = p[:, list(stops)].sum(axis=1)
    p[:, list(stops[1:])] = 0.0
    with np.errstate(divide="ignore"):
        rows: NDArray[np.float64] = np.log(p)
    return rows


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def slow_draw(row: NDArray[Any], u: float, temperature: float, top_p: float) -> tuple[int, float]:
    p = np.exp(row / temperature)
    p /= p.sum()
    if top_p < 1:
        kept: list[int] = []
        for outcome in np.argsort(-p, kind="stable"):
            if kept and p[kept].sum() >= top_p:
                break
            kept.append(int(outcome))
    else:
        kept = list(range(len(p)))
    target = u * p[kept].sum()
    for outcome in kept:
        target -= p[outcome]
        if target < 0:
            break
    return outcome, math.log(p[outcome] / p[kept].sum())


def assert_written(
    model: PreTrainedModel,
    prompt: Ints,
    seed: int,
    chunks: Sequence[ClosedChunk],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stops: Sequence[int] = STOPS,
) -> None:
    """The chunks are consecutive and say of every token what a plain forward says; the draws are the
    seed's."""
    assert [c.start for c in chunks] == np.cumsum([0, *(len(c.tokens) for c in chunks)])[:-1].tolist()
    tokens = np.concatenate([c.tokens for c in chunks])
    rows = slow_rows(model, prompt, tokens, stops)
    draws = uniforms(np.full(len(tokens), seed, dtype=np.uint64), np.arange(len(tokens)))
    place = 0
    for c in chunks:
        assert c.tail_logprobs is not None
        for i, token in enumerate(c.tokens):
            row = rows[place]
            others = [o for o in np.argsort(-row) if o not in stops][: len(c.support_ids[i])]
            assert c.support_ids[i].tolist() == others
            close(c.support_logprobs[i], row[[stops[0], *others]])
            close(c.tail_logprobs[i], np.log(np.exp(row).sum() - np.exp(row[[stops[0], *others]]).sum()))
            close(c.rollout_logprobs[i], row[token])
            outcome, logprob = slow_draw(row, float(draws[place]), temperature, top_p)
            assert token == outcome
            close(c.sampled_logprobs[i], logprob)
            place += 1


# --- decoding ---


def decoder(model: PreTrainedModel, **changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "slots": 3,
        "max_length": 48,
        "stop_ids": STOPS,
        "vocab_size": VOCAB,
        "teacher_top_k": TOP_K,
        "chunk_tokens": 5,
        "prefill_tokens": 8,
    }
    return Decoder(model, **settings | changes)


Written = dict[str, list[ClosedChunk]]


def collect(into: Written, chunks: Sequence[ClosedChunk]) -> None:
    for chunk in chunks:
        into.setdefault(chunk.key, []).append(chunk)


def drain(engine: Decoder) -> Written:
    written: Written = {}
    for _ in range(1000):
        if not engine.busy:
            return written
        collect(written, engine.step())
    raise AssertionError(f"{engine.busy} do not end")


def whole(chunks: Sequence[ClosedChunk]) -> list[int]:
    return [int(token) for c in chunks for token in c.tokens]


def alone(model: PreTrainedModel, prompt: Ints, seed: int, limit: int = 20, **changes: Any) -> list[ClosedChunk]:
    engine = decoder(model, **changes)
    engine.add("alone", prompt, seed=seed, max_new_tokens=limit)
    return drain(engine)["alone"]


@pytest.mark.parametrize("make", [qwen3, llama, gemma, granite])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_ragged_refilled_rollouts_equal_plain_forwards(
    make: Callable[[], PreTrainedModel], temperature: float, top_p: float
) -> None:
    model = make()
    engine = decoder(model, temperature=temperature, top_p=top_p)
    prompts = {f"r{n}": prompt_of(n) for n in (1, 17, 2, 9, 28, 5, 1)}
    waiting = list(prompts)
    written: Written = {}
    while waiting or engine.busy:
        while waiting and engine.free:
            key = waiting.pop(0)
            engine.add(key, prompts[key], seed=len(key) + 5, max_new_tokens=20)
        collect(written, engine.step())
    for key, prompt in prompts.items():
        chunks = written[key]
        assert_written(model, prompt, len(key) + 5, chunks, temperature=temperature, top_p=top_p)
        assert all(len(c.tokens) == 5 and c.finish is None for c in chunks[:-1])
        ended = int(chunks[-1].tokens[-1]) == STOPS[0]
        assert chunks[-1].finish == ("eos" if ended else "length")
        assert ended or len(whole(chunks)) == 20
        assert STOPS[0] not in whole(chunks)[:-1] and STOPS[1] not in whole(chunks)
    assert engine.decoded_tokens == sum(len(whole(chunks)) for chunks in written.values())


@pytest.mark.parametrize("stops", [(3,), (7, 3, 11)])
def test_any_number_of_stop_ids(student: PreTrainedModel, stops: tuple[int, ...]) -> None:
    chunks = alone(student, prompt_of(4), 1, stop_ids=stops)
    assert_written(student, prompt_of(4), 1, chunks, stops=stops)


def test_a_rollout_depends_neither_on_its_slot_nor_on_its_company(student: PreTrainedModel) -> None:
    expected = {seed: whole(alone(student, prompt_of(6), seed)) for seed in range(8)}
    assert len({tuple(tokens) for tokens in expected.values()}) > 4
    engine = decoder(student, slots=8, prefill_tokens=3)
    for seed in reversed(range(8)):
        engine.add(str(seed), prompt_of(6), seed=seed, max_new_tokens=20)
    written = drain(engine)
    assert {int(key): whole(chunks) for key, chunks in written.items()} == expected


def long_seed(model: PreTrainedModel, prompt: Ints, at_least: int) -> int:
    """A seed whose rollout is long enough for what a test does to it."""
    return next(seed for seed in range(100) if len(whole(alone(model, prompt, seed))) >= at_least)


def test_a_resumed_rollout_goes_on_alike_from_any_split(student: PreTrainedModel) -> None:
    prompt = prompt_of(6)
    seed = long_seed(student, prompt, 12)
    full = whole(alone(student, prompt, seed))
    engine = decoder(student, slots=4, prefill_tokens=5)
    waiting = list(range(len(full)))
    written: Written = {}
    while waiting or engine.busy:
        while waiting and engine.free:
            n = waiting.pop()
            engine.add(str(n), prompt, seed=seed, max_new_tokens=20, generated=np.array(full[:n], dtype=np.int32))
        collect(written, engine.step())
    for n in range(len(full)):
        assert written[str(n)][0].start == n
        assert whole(written[str(n)]) == full[n:]


def bits(chunks: Sequence[ClosedChunk]) -> bytes:
    """Everything that chunks say, to the last bit."""
    parts = [
        (c.tokens, c.support_ids, c.support_logprobs, c.tail_logprobs, c.rollout_logprobs, c.sampled_logprobs)
        for c in chunks
    ]
    return b"".join(array.tobytes() for part in parts for array in part if array is not None)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_alone_no_bit_depends_on_slot_company_or_resumption(student: PreTrainedModel, slots: int) -> None:
    prompt = prompt_of(6)
    seed = long_seed(student, prompt, 12)
    expected = alone(student, prompt, seed, alone=True)
    tokens = np.array(whole(expected), dtype=np.int32)
    engine = decoder(student, slots=slots, alone=True)
    waiting = [place for place in range(0, len(tokens), 5) for _ in range(3)]  # where chunks begin
    written: Written = {}
    while waiting or engine.busy:
        while waiting and engine.free:
            key = f"{len(waiting)} at {waiting[-1]}"
            if len(waiting) % 3:
                engine.add(key, prompt, seed=seed, max_new_tokens=20, generated=tokens[: waiting[-1]])
            else:
                engine.add(f"company {len(waiting)}", prompt_of(28), seed=len(waiting), max_new_tokens=1 + len(waiting))
            del waiting[-1]
        collect(written, engine.step())
    again = {key: chunks for key, chunks in written.items() if "company" not in key}
    assert len(written) - len(again) == len(expected) == len(again) / 2 >= 3
    for key, chunks in again.items():
        assert bits(chunks) == bits(expected[int(key.split()[-1]) // 5 :]), key


def test_alone_a_rollout_equals_plain_forwards(student: PreTrainedModel) -> None:
    assert_written(student, prompt_of(17), 1, alone(student, prompt_of(17), 1, alone=True))


def test_a_held_rollout_keeps_its_place_and_loses_nothing(student: PreTrainedModel) -> None:
    seed = long_seed(student, prompt_of(6), 12)
    expected = alone(student, prompt_of(6), seed)
    engine = decoder(student)
    engine.add("held", prompt_of(6), seed=seed, max_new_tokens=20)
    engine.add("other", prompt_of(11), seed=1, max_new_tokens=20)
    written: Written = {}
    for _ in range(7):
        collect(written, engine.step())
    engine.hold("held")
    before = engine.decoded_tokens
    for _ in range(30):  # the other ends, and is followed by a third in its slot
        collect(written, engine.step())
        if "other" not in engine.busy and "third" not in written and "third" not in engine.busy:
            engine.add("third", prompt_of(3), seed=2, max_new_tokens=4)
    assert engine.busy == ("held",) and engine.decoded_tokens > before
    assert engine.step() == []
    engine.release("held")
    collect(written, [chunk for chunks in drain(engine).values() for chunk in chunks])
    assert whole(written["held"]) == whole(expected)
    assert_written(student, prompt_of(6), seed, written["held"])


def test_a_rollout_may_be_held_before_its_first_step(student: PreTrainedModel) -> None:
    engine = decoder(student)
    engine.add("r", prompt_of(6), seed=1, max_new_tokens=3)
    engine.hold("r")
    for _ in range(3):
        assert engine.step() == []
    assert engine.decoded_tokens == 0
    engine.remove("r")
    engine.add("r", prompt_of(6), seed=1, max_new_tokens=3)  # a new admission is not held
    assert whole(drain(engine)["r"]) == whole(alone(student, prompt_of(6), 1, limit=3))


@pytest.mark.parametrize(
    ("unwatched", "generated", "lengths"),
    [
        *[(0, 0, [5, 5]), (5, 0, [5, 5]), (6, 0, [6, 5]), (13, 0, [13, 5]), (13, 7, [6, 5]), (13, 10, [5, 5])],
        *[(64, 0, [64, 5]), (70, 0, [64, 6]), (72, 3, [64, 5]), (80, 0, [64, 16])],
    ],
)
def test_a_chunk_ends_where_a_stop_may_come(unwatched: int, generated: int, lengths: list[int]) -> None:
    long: Any = {"max_length": 120, "temperature": 0}
    expected = whole(alone(MODELS["student"], prompt_of(2), 9, limit=85, **long))
    assert len(expected) == 85, "it must be long enough to show it"
    before = np.array(expected[:generated], dtype=np.int32)
    engine = decoder(MODELS["student"], **long)
    engine.add("r", prompt_of(2), seed=9, max_new_tokens=85, generated=before, unwatched=unwatched)
    chunks = drain(engine)["r"]
    assert [len(chunk.tokens) for chunk in chunks[:2]] == lengths
    assert [*before, *whole(chunks)] == expected


@settings(max_examples=15, deadline=None)
@given(st.sets(st.integers(0, 25)), st.integers(1, 7), st.integers(1, 12))
def test_where_chunks_close_and_prompts_are_cut_changes_nothing(
    closes: set[int], chunk_tokens: int, prefill_tokens: int
) -> None:
    model = MODELS["student"]
    engine = decoder(model, chunk_tokens=chunk_tokens, prefill_tokens=prefill_tokens)
    for n in (2, 9, 5):
        engine.add(str(n), prompt_of(n), seed=n, max_new_tokens=12)
    written: Written = {}
    steps = 0
    while engine.busy:
        collect(written, engine.step())
        steps += 1
        if steps in closes:
            collect(written, engine.close_chunks())
            assert engine.close_chunks() == []
    for n in (2, 9, 5):
        chunks = written[str(n)]
        assert all(1 <= len(c.tokens) <= chunk_tokens for c in chunks)
        expected = np.concatenate([c.rollout_logprobs for c in EXPECTED[n]])
        assert whole(chunks) == whole(EXPECTED[n])
        close(np.concatenate([c.rollout_logprobs for c in chunks]), expected)


MODELS = {"student": qwen3()}
EXPECTED = {n: alone(MODELS["student"], prompt_of(n), n, limit=12) for n in (2, 9, 5)}


def ending_seed(model: PreTrainedModel, prompt: Ints) -> tuple[int, int]:
    """A seed whose rollout ends by itself after a few tokens, and that number."""
    for seed in range(200):
        chunks = alone(model, prompt, seed)
        if chunks[-1].finish == "eos" and len(whole(chunks)) > 3:
            return seed, len(whole(chunks))
    raise AssertionError("no rollout ends")


def test_eos_wins_over_length(student: PreTrainedModel) -> None:
    seed, n = ending_seed(student, prompt_of(6))
    assert alone(student, prompt_of(6), seed, limit=n)[-1].finish == "eos"
    shorter = alone(student, prompt_of(6), seed, limit=n - 1)
    assert shorter[-1].finish == "length" and len(whole(shorter)) == n - 1


def test_a_full_chunk_that_ends_the_rollout_is_one_chunk(student: PreTrainedModel) -> None:
    seed, n = ending_seed(student, prompt_of(6))
    (chunk,) = alone(student, prompt_of(6), seed, chunk_tokens=n)
    assert chunk.finish == "eos" and len(chunk.tokens) == n


def test_a_text_may_fill_max_length_to_the_last_token(student: PreTrainedModel) -> None:
    seed = next(s for s in range(100) if alone(student, prompt_of(6), s, 12)[-1].finish == "length")
    chunks = alone(student, prompt_of(6), seed, 12, max_length=18)
    assert_written(student, prompt_of(6), seed, chunks)
    assert len(whole(chunks)) == 12


def test_remove_frees_the_slot_for_the_next_step(student: PreTrainedModel) -> None:
    engine = decoder(student, slots=1, chunk_tokens=3)
    seed = long_seed(student, prompt_of(6), 8)
    engine.add("cut", prompt_of(6), seed=seed, max_new_tokens=20)
    assert engine.free == 0 and engine.busy == ("cut",)
    for _ in range(5):
        engine.step()
    assert engine.remove("cut") == 5  # three stored, two open
    assert engine.free == 1
    with pytest.raises(KeyError):
        engine.remove("cut")
    engine.add("next", prompt_of(4), seed=2, max_new_tokens=20)
    assert_written(student, prompt_of(4), 2, drain(engine)["next"])


def test_remove_counts_what_a_resumed_rollout_came_with(student: PreTrainedModel) -> None:
    engine = decoder(student, prefill_tokens=2)
    engine.add("r", prompt_of(6), seed=1, max_new_tokens=20, generated=prompt_of(4))
    engine.step()  # still in prefill
    assert engine.remove("r") == 4


def test_no_token_is_forwarded_twice(student: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forwarded: list[int] = []
    forward = SlotModel.forward

    def count(self: SlotModel, rows: Any, tokens: Any, starts: Any, lengths: Any, logits_at: Any) -> Any:
        forwarded.append(int(lengths.sum()))
        return forward(self, rows, tokens, starts, lengths, logits_at)

    monkeypatch.setattr(SlotModel, "forward", count)
    chunks = alone(student, prompt_of(20), 1)
    # The last token drawn is never forwarded; prefill goes eight by eight.
    assert sum(forwarded) == 20 + len(whole(chunks)) - 1
    assert forwarded[:3] == [8, 8, 3]
    forwarded.clear()
    engine = scorer(student, prefill_tokens=64)
    for start in (0, 5, 10):
        engine.score([request("a", start, start + 5)])
    assert forwarded == [len(request("a", 0, 5).prompt) - 1, 5, 5, 5]


def test_what_does_not_fit_is_refused(student: PreTrainedModel) -> None:
    engine = decoder(student, slots=1)
    for prompt, limit, generated in [(prompt_of(40), 9, 0), (prompt_of(0), 5, 0), (prompt_of(4), 5, 5)]:
        with pytest.raises(ValueError, match="fit"):
            engine.add("r", prompt, seed=0, max_new_tokens=limit, generated=prompt_of(generated))
    engine.add("r", prompt_of(4), seed=-1, max_new_tokens=5)
    with pytest.raises(ValueError, match="already"):
        engine.add("r", prompt_of(4), seed=0, max_new_tokens=5)
    with pytest.raises(RuntimeError, match="no free slot"):
        engine.add("s", prompt_of(4), seed=0, max_new_tokens=5)
    with pytest.raises(KeyError):
        engine.hold("s")


def test_frequencies_of_a_first_token_are_its_probabilities(student: PreTrainedModel) -> None:
    rounds, slots = 40, 25
    engine = decoder(student, slots=slots, prefill_tokens=64)
    counts = np.zeros(VOCAB)
    for n in range(rounds):
        for slot in range(slots):
            engine.add(str(slot), prompt_of(3), seed=n * slots + slot, max_new_tokens=1)
        for chunk in (chunk for chunks in drain(engine).values() for chunk in chunks):
            counts[chunk.tokens[0]] += 1
    expected = np.exp(slow_rows(student, prompt_of(3), prompt_of(1))[0]) * rounds * slots
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert counts.sum() == 1000 and counts[STOPS[1]] == 0
    assert statistic < often.sum() + 5 * math.sqrt(2 * often.sum())


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = qwen3()
    engine = decoder(model)
    engine.add("r", prompt_of(4), seed=0, max_new_tokens=5)
    with torch.no_grad():
        model.state_dict()["lm_head.weight"].fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        engine.step()


# --- new weights ---


def test_swapped_weights_write_what_follows() -> None:
    model, other = qwen3(), qwen3(seed=5)
    engine = decoder(model)
    engine.add("r", prompt_of(6), seed=long_seed(model, prompt_of(6), 8), max_new_tokens=20)
    engine.step()
    engine.step()
    with pytest.raises(RuntimeError, match="close_chunks"):
        engine.swap(other.state_dict())
    (chunk,) = engine.close_chunks()
    assert len(chunk.tokens) == 2
    engine.swap(other.state_dict())
    assert engine.remove("r") == 2
    engine.add("new", prompt_of(6), seed=1, max_new_tokens=20)
    assert_written(other, prompt_of(6), 1, drain(engine)["new"])


def test_a_tied_name_may_be_left_out_and_must_agree() -> None:
    model, other = gemma(), gemma()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    slots = SlotModel(model, slots=1, capacity=8)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    untied = state.pop("lm_head.weight")
    slots.load(state)
    assert torch.equal(model.state_dict()["lm_head.weight"], untied)
    slots.load(state | {"lm_head.weight": untied})
    with pytest.raises(ValueError, match="tied"):
        slots.load(state | {"lm_head.weight": untied + 1})


def spoil(state: Mapping[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    spoilt = {name: tensor + 1 for name, tensor in state.items()}
    name = list(spoilt)[-1]
    if how == "missing":
        del spoilt[name]
    elif how == "unknown":
        spoilt["surplus"] = torch.zeros(1)
    else:
        spoilt[name] = spoilt[name][..., :-1]
    return spoilt


@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_change_nothing(how: str) -> None:
    model = qwen3()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=how):
        decoder(model).swap(spoil(before, how))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- slots ---


def test_a_position_beyond_the_capacity_is_refused(student: PreTrainedModel) -> None:
    slots = SlotModel(student, slots=2, capacity=8)
    with pytest.raises(ValueError, match="capacity"):
        slots.forward(np.array([0]), np.zeros((1, 3), np.int64), np.array([6]), np.array([3]), [0])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [1, 2], [3, 1], [2]])
def test_rows_are_the_ones_named_in_the_order_named(student: PreTrainedModel, order: list[int]) -> None:
    slots = SlotModel(student, slots=4, capacity=8)
    rows, texts = np.array(order), np.stack([prompt_of(6, seed) for seed in range(4)]).astype(np.int64)
    one = np.ones(len(rows), dtype=np.int64)
    slots.forward(None, texts[:, :5], np.zeros(4, np.int64), np.full(4, 5), [])
    got = slots.forward(rows, texts[rows, 5:], 5 * one, one, [0])[:, 0]
    expected = student(input_ids=torch.from_numpy(texts[rows]), use_cache=False).logits[:, -1]
    close(got.numpy(), expected.detach().numpy())


def test_padding_and_idle_rows_leave_the_cache_alone(student: PreTrainedModel) -> None:
    slots = SlotModel(student, slots=3, capacity=8)
    ids = prompt_of(8).astype(np.int64)
    tokens = np.stack([ids, ids, ids])
    slots.forward(None, tokens, np.zeros(3, np.int64), np.array([8, 5, 2]), [])
    layers: list[Any] = list(slots._cache.layers)
    held = [(layer.keys[:, :, :8].clone(), layer.values[:, :, :8].clone()) for layer in layers]
    # Row 0 is at the very end, row 1 idle, row 2 padded up to and beyond the capacity.
    slots.forward(None, tokens, np.array([7, 5, 2]), np.array([1, 0, 1]), [0])
    for layer, (keys, values) in zip(layers, held, strict=True):
        for row, until in ((0, 7), (1, 8), (2, 2)):
            assert torch.equal(layer.keys[row, :, :until], keys[row, :, :until])
            assert torch.equal(layer.values[row, :, :until], values[row, :, :until])
        assert torch.equal(layer.keys[2, :, 3:8], keys[2, :, 3:])


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 50))
def test_a_prefill_stays_within_its_budget_and_makes_progress(goals: list[int], budget: int) -> None:
    taken = rectangles(goals, budget)
    assert len(taken) * max(taken, default=0) <= budget
    assert bool(taken) == bool(goals)
    assert all(0 < take <= goal for take, goal in zip(taken, goals, strict=False))


def test_padded() -> None:
    pieces = [np.array([[1, 2]]), np.array([[3, 4], [5, 6]])]
    assert padded(pieces).tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (FalconMambaConfig(**SHAPE), "layer 0 is 'linear_attention', which keeps a running state"),
        (Llama4TextConfig(**SHAPE), "layer 0 is 'chunked_attention', which sees its own chunk of the text only"),
        (
            Qwen3Config(**SHAPE | {"layer_types": ["full_attention", "sliding_attention"]}),
            "layers and no sliding_window",
        ),
        (GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]]), "layer 1 is 'local'"),
        (Gemma3nTextConfig(**SHAPE | {"num_kv_shared_layers": 1}), "num_kv_shared_layers: 1 layers read the keys of"),
    ],
)
def test_models_with_other_attention_are_refused_with_the_reason(config: Any, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_attention(config)


def test_windows_and_full_attention_are_accepted() -> None:
    check_attention(Qwen3Config(**SHAPE | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}))
    check_attention(MistralConfig(**SHAPE | {"sliding_window": 8}))
    check_attention(MistralConfig(**SHAPE | {"sliding_window": None}))


# --- positions that change with the length of the text ---

ROPE = {"rope_theta": 100.0, "factor": 8.0}
LONGROPE = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
FULL = ["full_attention"] * 2


def with_rope(max_position_embeddings: int = 128, **rope: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    shape = SHAPE | {"max_position_embeddings": max_position_embeddings, "initializer_range": 0.3}
    return ready(LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=ROPE | rope)))


def nested(kind: str) -> PreTrainedModel:
    """A rope for each type of layer."""
    rope = {"full_attention": ROPE | {"rope_type": kind}, "sliding_attention": {"rope_type": "default"}}
    torch.manual_seed(3)
    return ready(Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, layer_types=FULL, rope_parameters=rope)))


def llama4(*, tuned: bool = True) -> PreTrainedModel:
    """Its layer without rope scales attention by a position that it takes from the cache."""
    scale = {"attn_temperature_tuning": tuned, "no_rope_layers": [1, 0], "floor_scale": 48, "attn_scale": 4.0}
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
    torch.manual_seed(3)
    config = Llama4TextConfig(**SHAPE | scale | experts, head_dim=8, layer_types=FULL)
    return ready(Llama4ForCausalLM(config))


def doge() -> PreTrainedModel:
    """Beyond 48 tokens attention keeps the 48 that it weighs most."""
    torch.manual_seed(3)
    model: Any = DogeForCausalLM(DogeConfig(**SHAPE, keep_window_size=48))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A, std=2.0)
    return ready(model)


def falcon() -> PreTrainedModel:
    shape = {"vocab_size": WIDTH, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ready(FalconForCausalLM(FalconConfig(**shape, alibi=True)))


def hunyuan() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 100.0}
    torch.manual_seed(3)
    shape = SHAPE | {"max_position_embeddings": 48, "head_dim": 8}
    return ready(HunYuanDenseV1ForCausalLM(HunYuanDenseV1Config(**shape, rope_parameters=rope)))


def ministral3() -> PreTrainedModel:
    """Scales attention by the position it is given, in steps of 16 tokens."""
    rope = ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 16, "llama_4_scaling_beta": 2.0}
    torch.manual_seed(3)
    return ready(Ministral3ForCausalLM(Ministral3Config(**SHAPE, head_dim=8, rope_parameters=rope)))


UNFIT: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "dynamic": (lambda: with_rope(48, rope_type="dynamic"), "LlamaConfig: rope_parameters: rope type 'dynamic'"),
    "longrope": (
        lambda: with_rope(**LONGROPE, original_max_position_embeddings=48),
        "LlamaConfig: rope_parameters: rope type 'longrope' changes beyond .* 48 tokens; allowed: .* up to 48, not 96",
    ),
    "llama4": (llama4, "Llama4TextConfig: attn_temperature_tuning"),
    "doge": (doge, "DogeConfig: keep_window_size: beyond 48 tokens"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_changes_with_the_length_is_refused(name: str) -> None:
    make, says = UNFIT[name]
    with pytest.raises(UnsupportedModelError, match=says):
        SlotModel(make(), slots=2, capacity=96)


def beyond(model: PreTrainedModel) -> float:
    """The largest difference between slots and a plain forward, relative to the largest logit: a text of 90 tokens, 40
    of them in the cache when the next 20 come, and then one by one."""
    ids = prompt_of(90).astype(np.int64)[None]
    slots = SlotModel(model, slots=1, capacity=96)
    edges = [0, 40, *range(60, 91)]
    got = [
        slots.forward(None, ids[:, a:b], np.array([a]), np.array([b - a]), [b - a - 1])[0, -1]
        for a, b in pairwise(edges)
    ]
    with torch.inference_mode():
        plain: Any = model(input_ids=torch.from_numpy(ids), use_cache=False).logits  # type: ignore[operator]
    expected = plain[0, [b - 1 for b in edges[1:]]]
    return float((torch.stack(got) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", UNFIT)
def test_the_self_test_would_not_see_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.slots.check_positions", lambda config, length: None)
    make, _ = UNFIT[name]
    assert self_test(make(), vocab_size=VOCAB) < 1e-4
    assert beyond(make()) > 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_rope(rope_type="linear"),
        lambda: with_rope(rope_type="yarn", original_max_position_embeddings=16),
        lambda: with_rope(
            rope_type="llama3", original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0
        ),
        lambda: with_rope(**LONGROPE, original_max_position_embeddings=96),
        lambda: nested("linear"),
        lambda: llama4(tuned=False),
        hunyuan,
        ministral3,
    ],
    ids=["linear", "yarn", "llama3", "longrope within", "nested", "llama4 untuned", "hunyuan", "ministral3"],
)
def test_what_does_not_change_is_the_same_at_any_length(make: Callable[[], PreTrainedModel]) -> None:
    assert beyond(make()) < 1e-4


def test_other_positions_that_slots_do_not_have_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Gemma3TextConfig: rope_parameters\.full_attention: .* 'dynamic'"):
        self_test(nested("dynamic"), vocab_size=VOCAB)
    with pytest.raises(UnsupportedModelError, match=r"FalconConfig: alibi: .* rotary or learned"):
        self_test(falcon(), vocab_size=VOCAB)


@pytest.mark.parametrize("make", [qwen3, llama, gemma, granite])
def test_self_test_passes(make: Callable[[], PreTrainedModel]) -> None:
    assert self_test(make(), vocab_size=VOCAB) < 1e-4
    half: Any = make()
    assert self_test(half.to(torch.bfloat16), vocab_size=VOCAB) < 5e-2


class Forgetful(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    """Thinks that every forward begins at position 0."""

    def forward(self, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


def test_self_test_states_the_difference() -> None:
    torch.manual_seed(0)
    model = Forgetful(Qwen3Config(**SHAPE | {"head_dim": 8}))
    with pytest.raises(UnsupportedModelError, match=r"differ from a plain forward by \d"):
        self_test(model, vocab_size=VOCAB)


def test_eager_attention_is_switched_to_sdpa() -> None:
    model = qwen3(attn_implementation="eager")
    assert_written(model, prompt_of(6), 1, alone(model, prompt_of(6), 1))
    assert model.config._attn_implementation == ONE_QUERY


# --- scoring ---


def scorer(model: PreTrainedModel, **changes: Any) -> Scorer:
    settings: dict[str, Any] = {"slots": 2, "max_length": 48, "stop_ids": STOPS, "vocab_size": VOCAB}
    return Scorer(model, **settings | {"prefill_tokens": 12} | changes)


def completion_of(n: int, seed: int = 0) -> Ints:
    return prompt_of(n, seed=seed + 100)


def support_of(n: int, seed: int = 0) -> Ints:
    rng = np.random.default_rng(seed)
    allowed = [i for i in range(VOCAB) if i not in STOPS]
    return np.stack([rng.permutation(allowed)[:TOP_K] for _ in range(n)]).astype(np.int32)


def request(key: str, start: int, end: int, *, prefix: bool = False) -> ScoreRequest:
    """A chunk of the rollout `key`: a prompt of its own, 30 tokens, some of them stop ids."""
    seed = sum(map(ord, key))
    completion = completion_of(30, seed)
    return ScoreRequest(
        key=key,
        prompt=prompt_of(5 + seed % 4, seed),
        start=start,
        tokens=completion[start:end],
        support_ids=support_of(30, seed)[start:end],
        prefix=completion[:start] if prefix else None,
    )


def assert_scored(model: PreTrainedModel, asked: ScoreRequest, scored: Scored) -> None:
    assert (scored.key, scored.start) == (asked.key, asked.start)
    seed = sum(map(ord, asked.key))
    completion = completion_of(30, seed)[: asked.start + len(asked.tokens)]
    rows = slow_rows(model, asked.prompt, completion)[asked.start :]
    assert scored.tail_logprobs is not None
    for i, row in enumerate(rows):
        columns = [STOPS[0], *asked.support_ids[i]]
        close(scored.teacher_logprobs[i], row[columns])
        close(scored.tail_logprobs[i], np.log(np.exp(np.delete(row, columns)).sum()))
        token = asked.tokens[i]
        close(scored.sampled[i], row[STOPS[0] if token in STOPS else token])


def check(model: PreTrainedModel, engine: Scorer, requests: Sequence[ScoreRequest]) -> None:
    scored = engine.score(requests)
    assert len(scored) == len(requests)
    for asked, answer in zip(requests, scored, strict=True):
        assert_scored(model, asked, answer)


def test_chunks_are_scored_as_they_come(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    assert engine.cached("a") == -1
    check(teacher, engine, [request("a", 0, 4)])
    assert engine.cached("a") == 4
    check(teacher, engine, [request("b", 0, 7), request("a", 4, 5)])
    check(teacher, engine, [request("a", 5, 16), request("b", 7, 9)])
    assert (engine.cached("a"), engine.cached("b")) == (16, 9)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(1, 29)), st.integers(1, 40), st.integers(1, 4))
def test_where_chunks_are_cut_and_asked_together_changes_nothing(
    cuts: set[int], prefill_tokens: int, at_once: int
) -> None:
    engine = scorer(MODELS["student"], prefill_tokens=prefill_tokens)
    edges = [0, *sorted(cuts), 30]
    chunks = [request("a", i, j) for i, j in pairwise(edges)]
    scored = [s for n in range(0, len(chunks), at_once) for s in engine.score(chunks[n : n + at_once])]
    close(np.concatenate([s.teacher_logprobs for s in scored]), WHOLE.teacher_logprobs)
    close(np.concatenate([s.sampled for s in scored]), WHOLE.sampled)


(WHOLE,) = scorer(MODELS["student"]).score([request("a", 0, 30)])


def test_more_rollouts_than_slots_go_in_waves_and_keep_their_order(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    requests = [request(key, start, start + 5) for start in (0, 5) for key in "abcde"]
    check(teacher, engine, requests)
    assert sum(engine.cached(key) == 10 for key in "abcde") == 2


def test_an_evicted_rollout_is_rebuilt_from_its_prefix(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    for key in "abc":
        check(teacher, engine, [request(key, 0, 6)])
    assert [engine.cached(key) for key in "abc"] == [-1, 6, 6]
    with pytest.raises(KeyError, match="a"):
        engine.score([request("b", 6, 9), request("a", 6, 9)])
    assert engine.cached("b") == 6  # nothing was done
    check(teacher, engine, [request("a", 6, 9, prefix=True)])
    assert [engine.cached(key) for key in "abc"] == [9, -1, 6]


def in_turn(model: PreTrainedModel, engine: Scorer, keys: str, rounds: int = 6) -> None:
    """Rollouts that advance in turn, five tokens at a time, each asked as a teacher worker asks."""
    for start in range(0, 5 * rounds, 5):
        for key in keys:
            prefix = engine.cached(key) != start
            check(model, engine, [request(key, start, start + 5, prefix=prefix)])


def test_slots_are_added_when_rollouts_come_back_that_were_evicted(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher, max_slots=7)
    in_turn(teacher, engine, "abcde")
    assert (engine.slots, engine.held) == (7, 5)
    # Of the second round a, b and c, which the third, fourth and fifth rollout had evicted: each its prompt, and 4 of
    # the 5 tokens in front of the chunk, as the last one is forwarded with the chunk. Nothing after that.
    rebuilt = engine.rebuilt_tokens
    assert 0 < rebuilt <= 5 * (9 + 4)
    engine.score([request("f", 0, 5)])
    assert (engine.slots, engine.rebuilt_tokens) == (7, rebuilt)


def test_no_slot_is_added_for_rollouts_that_do_not_come_back(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher, max_slots=8)
    for key in "abcdefgh":
        engine.score([request(key, 0, 5)])
    assert (engine.slots, engine.rebuilt_tokens) == (2, 0)


@pytest.mark.parametrize("free", [0, None])
def test_no_slot_is_added_where_memory_is_short(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    asked = []
    monkeypatch.setattr("actors.engine.slots.free_bytes", lambda device: asked.append(device) or free)
    engine = scorer(teacher, max_slots=8)
    in_turn(teacher, engine, "abc")
    assert (engine.slots, len(asked)) == (2, 1)  # and it is not asked for again
    assert engine.rebuilt_tokens > 0


def test_an_allocation_that_fails_leaves_the_slots_as_they_were(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, calls = SlotLayer.resize, []

    def failing(layer: SlotLayer, slots: int) -> None:
        calls.append(slots)
        if len(calls) == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        resize(layer, slots)

    monkeypatch.setattr(SlotLayer, "resize", failing)
    engine = scorer(teacher, max_slots=8)
    in_turn(teacher, engine, "abc")
    assert engine.slots == 2
    assert calls[:2] == [4, 4] and set(calls[2:]) == {2}


def test_an_error_that_is_not_about_memory_is_raised(teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scorer(teacher, max_slots=8)
    in_turn(teacher, engine, "abc", rounds=1)

    def failing(cache: SlotCache, slots: int) -> None:
        if slots > 2:
            raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(SlotCache, "resize", failing)
    with pytest.raises(RuntimeError, match="no kernel image"):
        engine.score([request("a", 5, 9, prefix=True)])


def test_the_least_recently_scored_is_evicted(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    engine.score([request("a", 0, 3), request("b", 0, 3)])
    engine.score([request("a", 3, 4)])
    engine.score([request("c", 0, 3)])
    assert [engine.cached(key) for key in "abc"] == [4, -1, 3]


def test_a_rollout_that_is_held_is_not_evicted_by_an_earlier_wave_of_its_call(
    teacher: PreTrainedModel,
) -> None:
    engine = scorer(teacher)
    engine.score([request("a", 0, 3), request("b", 0, 3)])
    check(teacher, engine, [request(key, 0, 3) for key in "cde"] + [request("a", 3, 6), request("b", 3, 4)])


def test_a_rollout_held_elsewhere_than_at_the_start_needs_its_prefix(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    engine.score([request("a", 0, 10)])
    for start in (4, 12):
        with pytest.raises(KeyError, match="a"):
            engine.score([request("a", start, 14)])
    check(teacher, engine, [request("a", 4, 10, prefix=True)])  # again
    check(teacher, engine, [request("a", 14, 20, prefix=True)])  # with a gap
    check(teacher, engine, [request("a", 0, 3)])  # from the start: no prefix exists
    check(teacher, engine, [request("a", 3, 5), request("a", 3, 5, prefix=True), request("a", 0, 2)])
    assert engine.cached("a") == 2


def test_a_key_used_for_another_text_is_not_mistaken(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    engine.score([request("a", 0, 6)])
    other = request("b", 0, 6)
    renamed = ScoreRequest("a", other.prompt, 0, other.tokens, other.support_ids)
    (scored,) = engine.score([renamed])
    (expected,) = scorer(teacher).score([other])
    close(scored.teacher_logprobs, expected.teacher_logprobs)
    elsewhere = ScoreRequest("a", (other.prompt + 1) % VOCAB, 6, other.tokens, other.support_ids)
    with pytest.raises(KeyError, match="a"):
        engine.score([elsewhere])


def test_rollouts_of_one_prompt_are_not_confused(teacher: PreTrainedModel) -> None:
    """The slot of the first is taken by the second, which begins with the same tokens."""
    engine = scorer(teacher, slots=1)
    first = request("a", 0, 12)
    tokens = first.tokens.copy()
    tokens[6:] = (tokens[6:] + 1) % VOCAB
    second = ScoreRequest("b", first.prompt, 0, tokens, first.support_ids)
    engine.score([first])
    (scored,) = engine.score([second])
    (expected,) = scorer(teacher).score([second])
    close(scored.teacher_logprobs, expected.teacher_logprobs)
    close(scored.sampled, expected.sampled)


def test_drop_frees_the_slot(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher)
    engine.score([request("a", 0, 3), request("b", 0, 3)])
    engine.drop("a")
    engine.drop("never seen")
    engine.score([request("c", 0, 3)])
    assert [engine.cached(key) for key in "abc"] == [-1, 3, 3]


def test_a_score_from_nothing_has_the_same_bits_whatever_was_scored_before(teacher: PreTrainedModel) -> None:
    asked = request("a", 10, 16, prefix=True)
    (expected,) = scorer(teacher).score([asked])
    engine = scorer(teacher)
    for before in ([request("a", 0, 10)], [request("a", 0, 3), request("b", 0, 30), request("c", 0, 9)]):
        engine.score(before)
        engine.forget()
        assert engine.cached("a") == -1
        (scored,) = engine.score([asked])
        assert scored.teacher_logprobs.tobytes() == expected.teacher_logprobs.tobytes()
        assert scored.sampled.tobytes() == expected.sampled.tobytes()
    assert_scored(teacher, asked, scored)


def test_what_cannot_be_scored_is_refused(teacher: PreTrainedModel) -> None:
    engine = scorer(teacher, max_length=20)
    good = request("a", 0, 5)
    for tokens, support, prefix in [
        (good.tokens[:0], good.support_ids[:0], None),
        (good.tokens, good.support_ids[:3], None),
        (good.tokens, good.support_ids, good.tokens),
    ]:
        with pytest.raises(ValueError, match="a: "):
            engine.score([ScoreRequest("a", good.prompt, 0, tokens, support, prefix)])
    with pytest.raises(ValueError, match="exceed"):
        engine.score([request("a", 0, 30)])
    assert engine.score([]) == []


def test_what_the_student_wrote_the_teacher_scores(student: PreTrainedModel) -> None:
    # The same model on both sides, so both say the same; and a support of everything has no tail.
    for top_k in (TOP_K, VOCAB):
        chunks = alone(student, prompt_of(6), 3, teacher_top_k=top_k)
        requests = [ScoreRequest("r", prompt_of(6), c.start, c.tokens, c.support_ids) for c in chunks]
        for chunk, scored in zip(chunks, scorer(student).score(requests), strict=True):
            close(scored.teacher_logprobs, chunk.support_logprobs)
            close(scored.sampled, chunk.rollout_logprobs)
            assert (chunk.tail_logprobs is None) == (scored.tail_logprobs is None) == (top_k == VOCAB)
            assert chunk.support_ids.dtype == np.int32 and chunk.support_ids.shape[1] == min(top_k, VOCAB - 2)
