"""The fault harness on the real processes: every kind once; and four safeguards taken away, which it must notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_servers import ENVIRONMENT, KINDS, OPTIONS, command_of, make_qwen3

from common.config import load
from ops.chaos.faults import kinds_for
from ops.reach.left_over import harness_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STUDENT = ROOT / "ops" / "models" / "student"
CHAOS = ROOT / "ops" / "experiments" / "chaos.yaml"
NEGATIVE = ROOT / "tests" / "negative"
# Silent workers are given up sooner than by default: what is tested is what happens then.
FEW = ("rollout.workers=1", "teacher.workers=1")  # what is struck elsewhere needs no second one
OF_SERVERS = ("stale-vllm", "pause-vllm", "kill-vllm")
HASTY = ("liveness.heartbeat_s=0.5", "liveness.claim_s=3", "liveness.learner_lease_s=4")
SERVER = (*OPTIONS, "--max-model-len", "128", "--max-logprobs", "16", "--max-num-seqs", "12")


def served(kind: str, student: Path) -> tuple[str, ...]:
    """Settings: a server of vLLM's API in front of the one worker."""
    command = [*command_of(kind, Path("{model}"), *SERVER), "--port", "{port}"]
    return (
        *(*FEW, "rollout.engine=vllm", f"student.model={student}", f"rollout.vllm.command={json.dumps(command)}"),
        f"rollout.vllm.start_timeout_s={60 if kind == 'standin' else 400}",
        "rollout.max_completion_length=96",
    )


def injure(folder: Path, *flags: str, sabotage: str = "", timeout_s: float = 580) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and chaos.json of `katana chaos`."""
    environment = os.environ | ENVIRONMENT
    if sabotage:
        environment |= {"KATANA_SABOTAGE": sabotage, "PYTHONPATH": str(NEGATIVE)}
    sets = [part for item in (f"runs_dir={folder}", *HASTY) for part in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", "chaos", str(CHAOS), "--seed", "5", *sets, *flags],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    output = done.stdout + done.stderr
    path = folder / "chaos-5" / "chaos.json"
    return done.returncode, output, json.loads(path.read_text()) if path.exists() else {}


def test_every_kind_of_fault_is_survived_with_nothing_lost(tmp_path: Path) -> None:
    kinds = kinds_for(load(CHAOS))
    code, output, result = injure(tmp_path, "--faults", str(len(kinds)))
    assert code == 0, output
    assert result["violations"] == []
    missed = [fault for fault in result["faults"] if not fault["injected"]]
    assert len(missed) <= 2, missed
    assert len(result["faults"]) - len(missed) >= 30
    assert f"{len(kinds) - len(missed)} faults of" in output
    assert result["counts"]["trained"] > 0
    # `katana run` restarted every role that was killed or stopped.
    assert (harness_folder(tmp_path / "chaos-5") / "chaos.log").read_text().count("; restarted") >= 7


def test_a_run_on_three_data_servers_survives_kills_of_any_of_them(tmp_path: Path) -> None:
    kinds = ("data-server-kill", "redis-kill", "kill-feeder", "kill-arbiter")
    few = [part for item in FEW for part in ("--set", item)]
    code, output, result = injure(
        tmp_path, "--servers", "3", "--faults", str(len(kinds)), "--kinds", ",".join(kinds), *few
    )
    assert code == 0, output
    assert result["violations"] == []
    assert [fault["kind"] for fault in result["faults"] if fault["injected"]].count("data-server-kill") >= 1
    assert result["counts"]["trained"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_vllm_server_may_be_killed_stopped_and_taken_by_another_run(kind: str, tmp_path: Path) -> None:
    sets = [part for one in served(kind, make_qwen3(tmp_path / "student", 0)) for part in ("--set", one)]
    flags = ("--faults", "3", "--kinds", ",".join(OF_SERVERS), *sets)
    code, output, result = injure(tmp_path, *flags, timeout_s=580 if kind == "standin" else 880)
    assert code == 0, output
    assert result["violations"] == []
    assert [fault["injected"] for fault in result["faults"]] == [True] * 3, result["faults"]
    assert result["counts"]["trained"] > 0
    assert result["counts"]["chunks_compared"] > 20
    assert result["counts"]["worst_nats"] < 0.05
    log = (tmp_path / "chaos-5" / "logs" / "rollout-0.log").read_text()
    assert "which is no version of this run" in log
    assert "the vLLM server answers again" in log


@pytest.mark.parametrize(
    ("sabotage", "statement", "kinds", "faults", "settings"),
    [
        # Many: the one who was paused must be quicker than the one who took over.
        ("owner", "owners_only", "pause-rollout", 8, ("rollout.workers=2",)),
        # No checkpoint before the first kill.
        ("early_ack", "booked_as_trained", "kill-learner", 2, ("checkpoints.every_steps=40",)),
        ("trim", "ended_once", "kill-teacher", 2, ("redis.shards=1",)),
        # Several: the witness looks at a sample. A minute, so it runs with the real server's tests.
        pytest.param(
            *("label", "written_by_its_version", "stale-vllm", 6, served("standin", STUDENT)), marks=pytest.mark.vllm
        ),
    ],
)
def test_a_safeguard_that_is_missing_is_noticed(
    tmp_path: Path, sabotage: str, statement: str, kinds: str, faults: int, settings: tuple[str, ...]
) -> None:
    sets = [part for item in (*FEW, *settings) for part in ("--set", item)]
    flags = ("--faults", str(faults), "--kinds", kinds, "--calm", "20", *sets)
    code, output, result = injure(tmp_path, *flags, sabotage=sabotage)
    assert code == 1, output
    assert statement in {one["statement"] for one in result["violations"]}, output
