"""Writers before a server of the vLLM API, for tests: models, a lock, what was written, and fixtures.

A module that imports `models_fixture` and `make_fixture` has the fixtures `models` and `make`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm_servers import OPTIONS, Server, make_qwen3

from actors.engine import ClosedChunk, Shared
from actors.engine.base_files import BaseFiles
from actors.vllm.chunks import Outcomes
from actors.vllm.writer import VllmWriter
from common.config import Vllm
from common.pretrained import read_facts

PROMPT = np.array([5, 11, 6, 15], np.int32)
CHUNK, LENGTH = 8, 120
SERVER = (*OPTIONS, "--max-model-len", "128", "--max-logprobs", "20", "--max-num-seqs", "16")
RUN = "run-1"


@dataclass
class Models:
    """A student's folder, and weights of it by version, of which one is hardly like another."""

    folder: Path
    model: PreTrainedModel
    published: dict[int, bytes] = field(default_factory=dict)

    def outcomes(self, top_p: float = 1.0) -> Outcomes:
        facts = read_facts(self.folder)
        return Outcomes(facts.stop_ids, facts.vocab_size, facts.vocab_size, 8, top_p)

    @torch.inference_mode()
    def logprobs(self, version: int, tokens: list[int]) -> np.ndarray:
        """Of what follows each token of a text, float64 [n, V]."""
        path = self.folder.parent / "loaded.safetensors"
        path.write_bytes(self.published[version])
        self.model.load_state_dict(load_file(path), strict=False)
        logits = self.model(input_ids=torch.tensor([tokens])).logits[0]
        return np.asarray(logits.double().log_softmax(-1).numpy())

    def difference(self, text: list[int], chunk: ClosedChunk) -> float:
        """The largest difference, in nats, between a chunk of a text and a plain forward of the weights that it
        names."""
        (stop,) = read_facts(self.folder).stop_ids
        assert chunk.version is not None
        start = len(PROMPT) + chunk.start
        rows = self.logprobs(chunk.version, text)[start - 1 : start - 1 + len(chunk.tokens)]
        drawn = rows[np.arange(len(rows)), chunk.tokens]
        kept = np.take_along_axis(rows, chunk.support_ids.astype(np.int64), axis=1)
        assert (chunk.support_ids != stop).all()
        listed = chunk.support_logprobs[:, 0] > -100.0
        rest = 1 - np.exp(chunk.support_logprobs.astype(np.float64)).sum(axis=1)
        assert chunk.tail_logprobs is not None
        assert np.allclose(np.exp(chunk.tail_logprobs), rest, atol=1e-6)
        differences = [
            np.abs(chunk.rollout_logprobs - drawn),
            np.abs(chunk.support_logprobs[:, 1:] - kept).max(axis=1),
            np.where(listed, np.abs(chunk.support_logprobs[:, 0] - rows[:, stop]), 0.0),
        ]
        return float(np.max(differences))

    def worst(self, chunks: list[ClosedChunk]) -> float:
        """The largest of all chunks of a rollout."""
        text = [*PROMPT.tolist(), *(token for chunk in chunks for token in chunk.tokens.tolist())]
        return max(self.difference(text, chunk) for chunk in chunks)


class Locks:
    """One lock a name, in place of those on Redis."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lost = False

    @contextlib.contextmanager
    def __call__(self, _: str) -> Iterator[Callable[[], bool]]:
        with self._lock:
            yield lambda: not self.lost


@dataclass
class Written:
    """A writer, and what it has written, by rollout."""

    writer: VllmWriter
    chunks: dict[str, list[ClosedChunk]] = field(default_factory=dict)

    def add(self, *keys: str, seed: int = 0, length: int = 40, **more: Any) -> None:
        for place, key in enumerate(keys):
            self.chunks.setdefault(key, [])
            self.writer.add(key, PROMPT, seed=seed + place, max_new_tokens=length, **more)

    def take(self, closed: list[ClosedChunk]) -> list[ClosedChunk]:
        for chunk in closed:
            so_far = self.chunks[chunk.key]
            assert chunk.start == sum(len(one.tokens) for one in so_far)
            so_far.append(chunk)
        return closed

    def step_until(self, true: Callable[[], bool], timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < until, "it did not come to that"
            self.take(self.writer.step())

    def finish(self, timeout_s: float = 120) -> None:
        self.step_until(lambda: not self.writer.busy, timeout_s)

    def tokens(self, key: str) -> list[int]:
        return [token for chunk in self.chunks[key] for token in chunk.tokens.tolist()]


Make = Callable[..., Written]


@pytest.fixture(scope="module", name="models")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    student = make_qwen3(folder / "student", 0)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    found = Models(student, model)
    (stop,) = read_facts(student).stop_ids
    for version in range(1, 5):
        torch.manual_seed(version)
        state = model.state_dict()
        changed = {name: tensor + 0.3 * torch.randn_like(tensor).mul(tensor.std()) for name, tensor in state.items()}
        head = changed["lm_head.weight"]
        head[stop] = 0.05 * head[stop]  # so that texts do not end at once
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "weights.safetensors")
        found.published[version] = (folder / "weights.safetensors").read_bytes()
    return found


@pytest.fixture(name="make")
def make_fixture(models: Models, tmp_path: Path) -> Iterator[Make]:
    """`make(server)`: a writer before it, attached and with the weights of version 1."""
    writers: list[VllmWriter] = []
    locks = Locks()

    def made(
        server: Server | str | None,
        *,
        version: int | None = 1,
        run: str = RUN,
        top_p: float = 1.0,
        student: Path = models.folder,
        head_size: int | None = None,
        number: int = 0,
        adapters: bool = True,
        **settings: Any,
    ) -> Written:
        if server is not None:
            settings["urls"] = [server if isinstance(server, str) else server.url]
        outcomes = models.outcomes(top_p)
        writer = VllmWriter(
            Vllm.model_validate({"start_timeout_s": 60.0, "patience_s": 60.0, **settings}),
            read_facts(student),
            outcomes=replace(outcomes, head_size=head_size or outcomes.head_size),
            slots=8,
            max_length=LENGTH,
            chunk_tokens=CHUNK,
            base=BaseFiles(student, torch.float32) if adapters else None,
        )
        writers.append(writer)
        shared = Shared(run, tmp_path / "weights", lambda: number, locks, lambda s: time.sleep(s) or False)
        assert writer.attach(shared)
        if version is not None:
            writer.swap(writer.read_weights(models.published[version]), version)
        return Written(writer)

    yield made
    for writer in writers:
        writer.end()
