"""A compiled decode step writes what the plain one writes."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from samples import make_config
from shipped_engines import STOPS, VOCAB, load_shipped

from actors.engine import ClosedChunk, Decoder
from actors.engine.compiled import CompileError, in_few_sizes, is_wanted
from actors.engine.loaded import compile_step
from common.config import parse
from common.pretrained import ModelError

SLOTS = 12


def make_decoder() -> Decoder:
    return Decoder(
        load_shipped("student"),
        slots=SLOTS,
        max_length=96,
        stop_ids=STOPS,
        vocab_size=VOCAB,
        teacher_top_k=8,
        chunk_tokens=8,
        prefill_tokens=256,
    )


def written(decoder: Decoder, count: int) -> dict[str, list[ClosedChunk]]:
    """Rollouts that come and go; two are held for a while, and new weights are swapped in."""
    chunks: dict[str, list[ClosedChunk]] = {}
    added = steps = 0

    def keep(closed: list[ClosedChunk]) -> None:
        for chunk in closed:
            chunks.setdefault(chunk.key, []).append(chunk)

    while added < count or decoder.busy:
        if decoder.free and added < count:  # one a step: the number of rows changes
            prompt = np.array([5, 11, 6, 15, 7 + added % 9][: 2 + added % 4], np.int32)
            decoder.add(f"r{added}", prompt, seed=added, max_new_tokens=80)
            added += 1
        if steps in (9, 15):
            for key in decoder.busy[1:3]:
                (decoder.hold if steps == 9 else decoder.release)(key)
        if steps == 20:
            keep(decoder.close_chunks())
            state = decoder._model.model.state_dict()
            decoder.swap({name: tensor + 0.001 for name, tensor in state.items() if "lm_head" not in name})
        keep(decoder.step())
        steps += 1
    return chunks


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_and_is_compiled_once() -> None:
    wanted = written(make_decoder(), 24)
    decoder = make_decoder()
    decoder.compile()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = written(decoder, 24)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert found.keys() == wanted.keys()
    same = 0
    for key, chunks in wanted.items():
        for one, other in zip(chunks, found[key], strict=False):
            if not np.array_equal(one.tokens, other.tokens):
                break  # a draw on the edge of two outcomes: from here on it is another text
            same += 1
            for mine, theirs in zip(astuple(one), astuple(other), strict=True):
                if isinstance(mine, np.ndarray) and mine.dtype == np.float32:
                    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=1e-4)
    assert same >= 0.9 * sum(map(len, wanted.values()))


def test_without_a_compiler_on_is_refused_and_the_step_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    decoder = make_decoder()
    with pytest.raises(CompileError, match=r"cannot be compiled: CompileError: no C\+\+ compiler"):
        decoder.compile()
    with pytest.raises(ModelError, match=r"rollout\.compile is .on., and the decode step cannot be compiled"):
        compile_step(decoder, "on")
    decoder.add("r", np.array([5, 11], np.int32), seed=1, max_new_tokens=4)
    while decoder.busy:
        decoder.step()
    assert decoder.decoded_tokens


def test_code_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, device: torch.device) -> Any:
        return lambda *args: function(*args) * 1.01

    monkeypatch.setattr("actors.engine.slots.compiled", wrong)
    monkeypatch.setattr("actors.engine.decode.compiled", lambda function, device: function)
    decoder = make_decoder()
    with pytest.raises(CompileError, match=r"its logits differ by 0\.0"):
        decoder.compile()
    assert not decoder._model.graphs and decoder._model._compiled is None


def test_it_is_compiled_where_operations_are_small_beside_their_start() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert [is_wanted(choice, cpu) for choice in ("auto", "on", "off")] == [False, True, False]
    assert [is_wanted(choice, gpu) for choice in ("auto", "on", "off")] == [True, True, False]


def test_with_cuda_graphs_there_are_few_sizes() -> None:
    assert [in_few_sizes(size, least=8, most=96) for size in (1, 8, 9, 40, 65, 96)] == [8, 8, 16, 64, 96, 96]
    assert in_few_sizes(3, least=8, most=5) == 5


def test_a_deterministic_run_compiles_nothing(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"rollout\.compile is 'on'; with deterministic only 'auto' and 'off'"):
        make_config(tmp_path, deterministic=True, learner={"weight_sync_steps": 1}, rollout={"compile": "on"})


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_yaml_may_read_it_as_a_boolean(word: str) -> None:
    config = parse(f"name: n\nstudent: {{model: a}}\nteacher: {{model: b}}\nrollout: {{compile: {word}}}")
    assert config.rollout.compile == word
