"""Models and writers for the tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from vllm_servers import Server, make_qwen3
from vllm_writers import CHUNK, LENGTH, RUN, Locks, Make, Models, Written

from actors.engine import Shared
from actors.vllm.writer import VllmWriter
from common.config import Vllm
from common.pretrained import read_facts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    student = make_qwen3(folder / "student", 0)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    found = Models(student, model)
    (stop,) = read_facts(student).stop_ids
    for version in range(1, 5):
        torch.manual_seed(version)
        state = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
        changed = {name: tensor + 0.3 * torch.randn_like(tensor).mul(tensor.std()) for name, tensor in state.items()}
        embedding = changed["model.embed_tokens.weight"]
        embedding[stop] = 0.05 * embedding[stop]  # so that texts do not end at once
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "weights.safetensors")
        found.published[version] = (folder / "weights.safetensors").read_bytes()
    return found


@pytest.fixture
def make(models: Models, tmp_path: Path) -> Iterator[Make]:
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
        )
        writers.append(writer)
        shared = Shared(run, tmp_path / "weights", f"w{len(writers)}", locks, lambda s: time.sleep(s) or False)
        assert writer.attach(shared)
        if version is not None:
            writer.swap(writer.read_weights(models.published[version]), version)
        return Written(writer)

    yield made
    for writer in writers:
        writer.end()
