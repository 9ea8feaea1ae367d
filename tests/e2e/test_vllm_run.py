"""Whole runs whose rollouts a vLLM server writes: the stand-in, and with `make test-vllm` the real one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from real_runs import SMALL, check_books, finish, read, start, wait_for_steps
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_servers import ENVIRONMENT, KINDS, OPTIONS, command_of, make_qwen3, serving, wait_until

from common.config import load
from common.wire.messages import ChunkSupport, ChunkTokens, RolloutHead
from common.wire.record import support_field, tokens_field
from ops.reach.run import Away, Outlook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, BATCH = 6, 16
SETTINGS = (
    *SMALL,
    "rollout.engine=vllm",
    "eval.every_steps=0",
    "rollout.max_completion_length=96",
    # All that is longer is stopped while it is written.
    "termination.policy=fixed",
    "termination.fixed_tokens=30",
    "learner.learning_rate=3e-3",  # so that versions can be told from each other
)
SERVER = (*OPTIONS, "--max-model-len", "128", "--max-logprobs", "20", "--max-num-seqs", "16")


Chunk = tuple[np.ndarray, int, np.ndarray, np.ndarray]
"""A rollout's first: prompt, version, tokens, rollout_logprobs."""


@dataclass
class Seen:
    """Of a run at work: first chunks by rollout, and published weights by version."""

    chunks: dict[str, Chunk] = field(default_factory=dict)
    weights: dict[int, Path] = field(default_factory=dict)

    def look(self, folder: Path, kept: Path, outlook: Outlook) -> None:
        for path in (folder / "weights").glob("v*.safetensors"):
            version = int(path.stem.removeprefix("v"))
            if version not in self.weights:
                self.weights[version] = kept / path.name
                shutil.copy(path, kept)
        try:
            plane = outlook.look().plane
        except Away:
            return
        unknown = [rid for rid in plane.open_rollouts() if rid not in self.chunks]
        for rid, record in zip(unknown, plane.rollouts(unknown), strict=True):
            if (data := record.get(tokens_field(0).encode())) and (support := record.get(support_field(0).encode())):
                tokens, head = ChunkTokens.decode(data), RolloutHead.decode(record[b"head"])
                logprobs = ChunkSupport.decode(support).rollout_logprobs
                self.chunks[rid] = (head.prompt, tokens.policy_version, tokens.tokens, logprobs)


def watch(process: subprocess.Popen[str], folder: Path, kept: Path) -> Seen:
    """What a run at work shows, until it ends."""
    wait_until(lambda: (folder / "config.yaml").exists(), 120)
    outlook = Outlook(load(folder / "config.yaml"), folder / "config.yaml")
    seen = Seen()
    try:
        while process.poll() is None:
            seen.look(folder, kept, outlook)
            time.sleep(0.05)
    finally:
        outlook.close()
    return seen


@torch.inference_mode()
def distance(model: torch.nn.Module, chunk: Chunk) -> float:
    """Largest difference in nats between what a first chunk says and a plain forward."""
    prompt, _, tokens, logprobs = chunk
    text = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    found = model(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = found.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].numpy()
    return float(np.abs(own - logprobs).max())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_two_workers_write_with_one_server_and_every_token_has_its_version(kind: str, tmp_path: Path) -> None:
    student = make_qwen3(tmp_path / "student", 0)
    kept = tmp_path / "kept"
    kept.mkdir()
    with serving(kind, student, tmp_path / "server.log", *SERVER) as server:
        settings = (
            *(*SETTINGS, f"student.model={student}", "rollout.workers=2", "rollout.slots=8"),
            f"rollout.vllm.urls=[{server.url}]",
        )
        process = start(tmp_path, settings=settings)
        seen = watch(process, tmp_path / "e2e", kept)
        code, output = finish(process)
        assert code == 0, output
        counted = server.generated()
        assert server.get("/is_paused").json() == {"is_paused": False}
    check_books(tmp_path / "e2e", STEPS)
    lines = read(tmp_path / "e2e" / "rollouts.jsonl")
    written = sum(line["tokens_generated"] for line in lines)
    assert counted == written
    assert all(line["policy_version_first"] <= line["policy_version_last"] for line in lines)
    assert any(line["policy_version_first"] < line["policy_version_last"] for line in lines)
    assert any(line["tokens_generated"] > line["tokens_kept"] for line in lines)  # they were stopped

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    of_versions: dict[int, list[Chunk]] = {}
    for chunk in seen.chunks.values():
        of_versions.setdefault(chunk[1], []).append(chunk)
    assert len({*of_versions} & {*seen.weights}) >= 3
    others = []
    for version in sorted({*of_versions} & {*seen.weights}):
        model.load_state_dict(load_file(seen.weights[version]), strict=False)
        assert max(distance(model, chunk) for chunk in of_versions[version]) < 1e-3
        others += [distance(model, one) for other in of_versions if other != version for one in of_versions[other]]
    assert np.median(others) > 1e-2


def servers_of(student: Path) -> list[int]:
    """Pids of the servers of a model; a worker's guard, which has their command in its own, comes after its server."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if entry.name.isdigit() and str(student) in words and not any(word.endswith("guard.py") for word in words):
                found.append(int(entry.name))
    return found


def test_a_server_that_is_killed_is_started_again_and_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    student = make_qwen3(tmp_path / "student", 0)
    command = [*command_of(kind, Path("{model}"), *SERVER), "--port", "{port}"]
    settings = (*SETTINGS, f"student.model={student}", f"rollout.vllm.command={json.dumps(command)}")
    process = start(tmp_path, settings=settings, environment=ENVIRONMENT)
    folder = tmp_path / "e2e"
    wait_for_steps(folder, 2, process, timeout_s=300)
    (pid,) = servers_of(student)
    os.kill(pid, signal.SIGKILL)
    code, output = finish(process, timeout_s=360)
    assert code == 0, output
    check_books(folder, STEPS)
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)) == STEPS * BATCH
    assert "the vLLM server answers again" in (folder / "logs" / "rollout-0.log").read_text()
    wait_until(lambda: not servers_of(student), 30)
