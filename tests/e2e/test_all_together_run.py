"""One run of all that a config may ask for at once: two teachers, a reward, a forward KL that the teachers add to, a
policy and a weighting that read views, and LoRA. Learner, feeder and a teacher are killed, the run is interrupted and
continued with one more worker; then each part is asked what it left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_runs import (
    DEMO,
    SMALL,
    TEACHERS,
    check_books,
    check_views,
    children_of,
    finish,
    read,
    start,
    wait_for_steps,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.config import load
from common.pretrained import read_facts
from common.wire.messages import ChunkSupport, ChunkTokens, RolloutHead, ScoreSupport
from common.wire.record import tokens_field
from ops.chaos.checker import check_folder
from ops.cli.main import main
from ops.reach.run import Away, Outlook
from ops.tasks.pretrain import shift

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STUDENT, TEACHER = (DEMO.parents[1] / "models" / name for name in ("student", "teacher"))
STEPS, BATCH = 12, 16
TOGETHER = (
    "student.model=ops/models/student",  # it need not know the other dialect here
    "teachers.shifted.workers=2",
    "data.num_generations=4",
    "reward.mode=grpo",
    "reward.weight=0.1",
    "reward.of_cut=as_wrong",
    "loss.mode=forward_kl_topk_tail",
    "loss.weighting=entropy",
    "rollout.teacher_support=2",
    "termination.policy=entropy",
    "termination.eta=0.3",
    "termination.min_calibration=8",
    "termination.control_fraction=0.5",  # few are cut, and so many are judged
    "learner.lora.rank=8",
    "learner.learning_rate=2e-3",
    f"learner.max_steps={STEPS}",
    "feeder.record_audit=true",
)


@dataclass(frozen=True)
class Everything:
    """The run when it is over, and what its Redis held in its middle."""

    folder: Path
    output: str
    models: dict[str, Path]  # of the teachers
    records: dict[str, dict[bytes, bytes]]  # of each teacher that of a rollout with a scored second chunk


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    place = tmp_path_factory.mktemp("everything")
    folder, shifted = place / "all", place / "shifted"
    shift(TEACHER, shifted)
    settings = (*SMALL, *TOGETHER, f"teachers.shifted.model={shifted}")
    process = start(place, name="all", settings=settings, config=TEACHERS)
    wait_for_steps(folder, 1, process)
    records = scored_rollouts(folder, process)
    for steps, role in ((2, "feeder"), (3, "teacher"), (4, "learner")):
        wait_for_steps(folder, steps, process)
        os.kill(children_of(folder)[role], signal.SIGKILL)
        time.sleep(0.5)
    deadline = time.monotonic() + 120
    while "continuing from step" not in (folder / "logs" / "learner.log").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    wait_for_steps(folder, 5, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process, timeout_s=60)
    assert code == 130, output
    code, output = finish(start(place, "--resume", "--set", "teachers.plain.workers=2", name="all"))
    assert code == 0, output
    return Everything(folder, output, {"plain": TEACHER, "shifted": shifted}, records)


def scored_rollouts(folder: Path, process: subprocess.Popen[str], timeout_s: float = 120) -> dict[str, Any]:
    """Of each teacher the record of a rollout with a scored second chunk, from the Redis of a run at work."""
    outlook = Outlook(load(folder / "config.yaml"), folder / "config.yaml")
    found: dict[str, Any] = {}
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


def test_each_rollout_is_booked_once_and_every_verdict_comes_out_again(everything: Everything) -> None:
    folder = everything.folder
    check_books(folder, steps=STEPS)
    assert check_folder(folder) == []  # each verdict and each advantage is computed again
    trained = [rid for line in read(folder / "trained.jsonl") for rid in line["rids"]]
    assert len(trained) == len(set(trained)) == STEPS * BATCH
    assert {line["step"] for line in read(folder / "eval.jsonl")} == {0, 3, 6, 9, STEPS}
    assert (folder / "logs" / "learner.log").read_text().count("continuing from step") >= 2  # killed, interrupted
    assert all(0 < line["support_mass_teacher"] <= 1.0001 for line in read(folder / "metrics.jsonl"))


def test_the_views_that_the_policy_read_are_on_record(everything: Everything) -> None:
    assert any(line["finish_reason"] == "low_entropy" for line in read(everything.folder / "rollouts.jsonl"))
    check_views(everything.folder, stopped_by="low_entropy")


def test_each_rollout_is_scored_by_its_own_teacher(everything: Everything) -> None:
    folder, models = everything.folder, everything.models
    assert set(everything.records) == set(models)
    for teacher, record in everything.records.items():
        stored = ScoreSupport.decode(record[b"q:1"])
        assert stored.own_ids is not None and stored.own_logprobs is not None
        for name, model in models.items():
            logprobs, sampled, support = logprobs_of(model, record)
            own = np.take_along_axis(logprobs, stored.own_ids.astype(np.int64), axis=1)
            apart = max(
                np.abs(stored.sampled_logprobs - sampled).max(),
                np.abs(stored.teacher_logprobs[:, 1:] - support).max(),
                np.abs(stored.own_logprobs - own).max(),
            )
            assert (apart < 1e-3) == (name == teacher), (teacher, name, apart)
            assert name == teacher or apart > 0.1
    lines, summary = read(folder / "rollouts.jsonl"), json.loads((folder / "summary.json").read_text())
    of = {name: [line for line in lines if line["teacher"] == name] for name in models}
    assert all(len(some) > 20 for some in of.values()) and sum(map(len, of.values())) == len(lines)
    assert set(summary["teachers"]) == set(models)
    for name, some in of.items():
        assert summary["teachers"][name]["rollouts"] == len(some)
        assert f"teacher {name}: {len(some)} rollouts" in everything.output
        assert summary["teachers"][name]["mean_generated"] == pytest.approx(
            sum(line["tokens_generated"] for line in some) / len(some)
        )
        assert (folder / "logs" / f"teacher-{name}-1.log").is_file()
    page = (folder / "report.html").read_text()
    assert "<caption>Teachers:" in page and '"name":"teacher"' in page


def logprobs_of(model: Path, record: dict[bytes, bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A model's log-probabilities of a rollout's second chunk, float64, by one plain forward of transformers over
    prompt and completion: of all ids [n, V], of the sampled ones [n], and of the student's support [n, K]."""
    head = RolloutHead.decode(record[b"head"])
    chunks = [ChunkTokens.decode(record[tokens_field(seq).encode()]).tokens for seq in range(2)]
    support = ChunkSupport.decode(record[b"p:1"]).support_ids
    ids = np.concatenate([head.prompt, *chunks]).astype(np.int64)
    first, n = len(head.prompt) + len(chunks[0]), len(chunks[1])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=torch.tensor(ids[None])).logits[0].double()
    logprobs = logits[first - 1 : first - 1 + n].log_softmax(-1).numpy()
    return logprobs, logprobs[np.arange(n), chunks[1]], np.take_along_axis(logprobs, support.astype(np.int64), axis=1)


def test_the_models_of_both_teachers_have_one_tokenizer(everything: Everything) -> None:
    shifted = everything.models["shifted"]
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    assert all(json.loads((shifted / name).read_text()) == json.loads((TEACHER / name).read_text()) for name in names)
    assert read_facts(shifted).stop_ids == read_facts(TEACHER).stop_ids


def test_it_trains_with_the_advantages_of_its_verdicts(everything: Everything) -> None:
    folder = everything.folder
    trained = read(folder / "trained.jsonl")
    advantages = [one for line in trained for one in line["advantages"]]
    assert len(advantages) == STEPS * BATCH
    assert min(advantages) < 0 < max(advantages), "nobody was compared"
    rewards = json.loads((folder / "summary.json").read_text())["rewards"]
    assert rewards["with_signal"] >= 1
    assert f"{rewards['groups']} groups rewarded" in everything.output
    judged = {line["reward"] for line in read(folder / "rollouts.jsonl") if line["ending"] == "trained"}
    assert judged <= {"right", "wrong"}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 34).view(2, 16)
    found: torch.Tensor = model(input_ids=ids).logits.detach()
    return found


def test_it_leaves_a_merged_model_and_an_adapter_that_compute_the_same(everything: Everything) -> None:
    folder = everything.folder
    assert "refused" not in (folder / "logs" / "rollout-0.log").read_text()
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert float((merged - before).abs().max()) > 1e-2
    newest = max((folder / "checkpoints").glob("step-*[0-9]"))
    assert all(".lora_" in name for name in load_file(newest / "model.safetensors"))


def test_it_is_audited_by_its_model_and_by_the_newest_weights(
    everything: Everything, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all"
    shutil.copytree(everything.folder, folder, ignore=shutil.ignore_patterns("redis"))
    assert main(["audit", str(folder), "--samples", "1", "--rollouts", "4"]) == 0
    for path in (folder / "model").iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["audit", str(folder), "--samples", "1", "--rollouts", "4"]) == 0
    assert "weights/v" in capsys.readouterr().out
