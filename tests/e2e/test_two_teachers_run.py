"""A student that learns two dialects from two teachers, in real runs: interrupted, continued, deterministic."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_runs import DEMO, SMALL, check_books, finish, read, start, wait_for_steps
from transformers import AutoModelForCausalLM

from common.config import load
from common.pretrained import read_facts
from common.wire.messages import ChunkSupport, ChunkTokens, RolloutHead, ScoreSupport
from common.wire.record import tokens_field
from ops.chaos.checker import check_folder
from ops.reach.run import Away, Outlook
from ops.tasks.pretrain import shift

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEACHER = DEMO.parents[1] / "models" / "teacher"
TEACHERS = DEMO.with_name("demo-teachers.yaml")
STUDENT = "student.model=ops/models/student"  # it need not know the other dialect here


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "shifted"
    shift(TEACHER, folder)
    return folder


def scored_rollouts(folder: Path, process: subprocess.Popen[str], timeout_s: float = 120) -> dict[str, dict[str, Any]]:
    """Of each teacher the record of a rollout with a scored second chunk, from the Redis of a run at work."""
    outlook = Outlook(load(folder / "config.yaml"), folder / "config.yaml")
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while set(found) != {"plain", "shifted"}:
            assert time.monotonic() < deadline and process.poll() is None
            try:
                plane = outlook.look().plane
            except Away:
                time.sleep(0.1)
                continue
            for record in plane.rollouts(plane.open_rollouts()):
                if b"q:1" in record and b"head" in record:
                    found.setdefault(RolloutHead.decode(record[b"head"]).scored_by, record)
            time.sleep(0.05)
    finally:
        outlook.close()
    return found


def logprobs_of(model: Path, record: dict[bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A model's log-probabilities of the sampled tokens of a rollout's second chunk, float64 [n], and of its support
    [n, K], by one plain forward of transformers over prompt and completion."""
    head = RolloutHead.decode(record[b"head"])
    chunks = [ChunkTokens.decode(record[tokens_field(seq).encode()]).tokens for seq in range(2)]
    support = ChunkSupport.decode(record[b"p:1"]).support_ids
    ids = np.concatenate([head.prompt, *chunks]).astype(np.int64)
    first, n = len(head.prompt) + len(chunks[0]), len(chunks[1])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.tensor(ids[None])).logits[0].double()
    logprobs = logits[first - 1 : first - 1 + n].log_softmax(-1).numpy()
    return logprobs[np.arange(n), chunks[1]], np.take_along_axis(logprobs, support.astype(np.int64), axis=1)


def test_a_run_with_two_teachers_is_interrupted_and_ends_with_each_rollout_scored_by_its_own(
    tmp_path: Path, shifted: Path
) -> None:
    folder = tmp_path / "two"
    settings = (
        *SMALL,
        STUDENT,
        f"teachers.shifted.model={shifted}",
        "teachers.shifted.workers=2",
        "feeder.record_audit=true",
    )
    process = start(tmp_path, name="two", settings=(*settings, "learner.max_steps=8"), config=TEACHERS)
    models = {"plain": TEACHER, "shifted": shifted}
    wait_for_steps(folder, 1, process)
    for teacher, record in scored_rollouts(folder, process).items():
        stored = ScoreSupport.decode(record[b"q:1"])
        for name, model in models.items():
            sampled, support = logprobs_of(model, record)
            apart = max(
                np.abs(stored.sampled_logprobs - sampled).max(), np.abs(stored.teacher_logprobs[:, 1:] - support).max()
            )
            assert (apart < 1e-3) == (name == teacher), (teacher, name, apart)
            assert name == teacher or apart > 0.1
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=60)
    assert code == 130, output
    process = start(tmp_path, "--resume", "--set", "teachers.plain.workers=2", name="two")
    code, output = finish(process)
    assert code == 0, output
    summary = check_books(folder, steps=8)
    assert check_folder(folder) == []
    lines = read(folder / "rollouts.jsonl")
    of = {name: [line for line in lines if line["teacher"] == name] for name in models}
    assert all(len(some) > 20 for some in of.values()) and sum(map(len, of.values())) == len(lines)
    for name, some in of.items():
        assert summary["teachers"][name]["rollouts"] == len(some)
        assert f"teacher {name}: {len(some)} rollouts" in output
        assert summary["teachers"][name]["mean_generated"] == pytest.approx(
            sum(line["tokens_generated"] for line in some) / len(some)
        )
        assert (folder / "logs" / f"teacher-{name}-1.log").is_file()
    page = (folder / "report.html").read_text()
    assert "<caption>Teachers:" in page and '"name":"teacher"' in page


def test_a_deterministic_run_with_two_teachers_ends_with_the_same_weights(tmp_path: Path, shifted: Path) -> None:
    deterministic = ("deterministic=true", "learner.batch_size=4", "learner.max_steps=3", "rollout.slots=4")
    more = ("checkpoints.every_steps=1", "eval.every_steps=0", f"teachers.shifted.model={shifted}")
    digests = set()
    for name, workers in (("one", 1), ("other", 2)):
        settings = (*SMALL, STUDENT, *deterministic, *more, f"teachers.plain.workers={workers}")
        code, output = finish(start(tmp_path, name=name, settings=settings, config=TEACHERS))
        assert code == 0, output
        check_books(tmp_path / name, steps=3)
        assert {line["teacher"] for line in read(tmp_path / name / "rollouts.jsonl")} == {"plain", "shifted"}
        digests.add(hashlib.sha256((tmp_path / name / "model" / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_models_of_both_teachers_have_one_tokenizer(shifted: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    assert all(json.loads((shifted / name).read_text()) == json.loads((TEACHER / name).read_text()) for name in names)
    assert read_facts(shifted).stop_ids == read_facts(TEACHER).stop_ids
