"""What the checker says of chunks that other weights wrote than those that they name, with real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.pretrained import PACKAGE_ROOT
from ops.chaos.written import MOST_NATS, Seen, SeenChunk, check_written

STUDENT = PACKAGE_ROOT / "ops" / "models" / "student"
PROMPT = np.array([5, 11, 6, 15], np.int32)
TOKENS = np.array([7, 9, 4, 12, 8, 3, 6, 10], np.int32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student's own, those of a small step further, and far ones."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    found = {}
    own = load_file(STUDENT / "model.safetensors")
    for name, size in (("own", 0.0), ("step", 1e-3), ("far", 1.0)):
        changed = {key: values + size * values.std() * torch.randn_like(values) for key, values in own.items()}
        found[name] = folder / f"{name}.safetensors"
        save_file(changed, found[name], {"format": "pt"})
    return found


@torch.inference_mode()
def written(path: Path, *lengths: int, version: int = 3) -> list[SeenChunk]:
    """Chunks of these lengths as these weights write them."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    model.load_state_dict(load_file(path), strict=False)
    text = torch.tensor([[*PROMPT.tolist(), *TOKENS.tolist()]])
    rows = model(input_ids=text).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    logprobs = rows[range(len(TOKENS)), TOKENS].numpy()
    ends = np.cumsum(lengths)
    return [
        SeenChunk(version, TOKENS[end - length : end], logprobs[end - length : end])
        for end, length in zip(ends, lengths, strict=True)
    ]


def test_chunks_of_their_versions_agree_to_rounding(weights: dict[str, Path]) -> None:
    seen = Seen({"r1": PROMPT}, {"r1": written(weights["own"], 3, 5)}, {3: [weights["own"]]})
    violations, looked_at = check_written(seen, str(STUDENT), frozenset())
    assert violations == []
    assert [(one.rid, one.seq, one.version) for one in looked_at] == [("r1", 0, 3), ("r1", 1, 3)]
    assert max(one.nats for one in looked_at) < 1e-4


def test_a_chunk_of_other_weights_is_named(weights: dict[str, Path]) -> None:
    chunks = [written(weights["own"], 3, 5)[0], written(weights["far"], 3, 5)[1]]
    seen = Seen({"r1": PROMPT, "r2": PROMPT}, {"r1": chunks, "r2": chunks}, {3: [weights["own"]]})
    violations, looked_at = check_written(seen, str(STUDENT), frozenset({"r2"}))  # r2 was poisoned on purpose
    assert [(one.statement, one.rid) for one in violations] == [("written_by_its_version", "r1")]
    assert violations[0].detail.startswith("chunk 1: ")
    assert "nats a token from version 3" in violations[0].detail
    assert max(one.nats for one in looked_at) > 5 * MOST_NATS


def test_logprobs_that_are_not_numbers_are_not_near_anything(weights: dict[str, Path]) -> None:
    (chunk,) = written(weights["own"], 8)
    broken = SeenChunk(chunk.version, chunk.tokens, np.full(8, np.nan, np.float32))
    violations, _ = check_written(
        Seen({"r1": PROMPT}, {"r1": [broken]}, {3: [weights["own"]]}), str(STUDENT), frozenset()
    )
    assert [one.rid for one in violations] == ["r1"]


def test_a_version_that_was_published_twice_is_either(weights: dict[str, Path]) -> None:
    copies = {3: [weights["own"], weights["far"]]}
    seen = Seen(
        {"r1": PROMPT, "r2": PROMPT}, {"r1": written(weights["own"], 8), "r2": written(weights["far"], 8)}, copies
    )
    violations, looked_at = check_written(seen, str(STUDENT), frozenset())
    assert violations == []
    assert max(one.nats for one in looked_at) < 1e-4


def test_what_older_weights_have_cached_is_not_taken_for_another_run_s(weights: dict[str, Path]) -> None:
    seen = Seen({"r1": PROMPT}, {"r1": written(weights["step"], 8)}, {3: [weights["own"]]})
    violations, looked_at = check_written(seen, str(STUDENT), frozenset())
    assert violations == []
    assert looked_at[0].nats > 1e-4


def test_a_run_of_which_nothing_could_be_compared_is_not_passed(weights: dict[str, Path]) -> None:
    seen = Seen({"r1": PROMPT}, {"r1": written(weights["own"], 8, version=4)}, {3: [weights["own"]]})
    violations, looked_at = check_written(seen, str(STUDENT), frozenset())
    assert looked_at == []
    assert "no chunk could be compared" in violations[0].detail
