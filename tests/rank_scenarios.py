"""What tests/learner/test_sharded.py has several ranks do, in processes of their own.

`python rank_scenarios.py FOLDER NAME …` imports torch once and forks a learner for each scenario; each writes
FOLDER/NAME.json, with its log on stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from samples import make_config

from common.config import Config
from common.pretrained import PACKAGE_ROOT, Pair, read_facts
from learner import gradients, sharded
from learner.balance import balanced
from learner.batch import MicroBatch, Trajectory
from learner.checkpoint import CheckpointState, load_newest, save
from learner.ranks import RankFailed
from learner.student import TrainableStudent
from ops.run.ranks import Others, fork_others

MODEL = PACKAGE_ROOT / "ops" / "models" / "student"
STEPS, SIZE, RATE = 5, 9, 1e-3
Make = Callable[[Path, Config], TrainableStudent]


def settings(folder: Path, ranks: int, dtype: str = "float32") -> Config:
    return make_config(
        folder,
        student={"model": str(MODEL)},
        teacher={"model": str(MODEL)},
        learner={"dtype": dtype, "learning_rate": RATE, "nproc_per_node": ranks},
        eval={"every_steps": 0},
    )


def pair() -> Pair:
    facts = read_facts(MODEL)
    return Pair(facts, {"": facts}, facts.stop_ids, facts.vocab_size)


def batch_of(step: int) -> list[Trajectory]:
    """Random trajectories, the same for the same step; the third batch has a single one, fewer than ranks."""
    rng = np.random.default_rng(step)
    return [_trajectory(rng, f"r{step}-{number}") for number in range(1 if step == 2 else SIZE)]


def _trajectory(rng: np.random.Generator, rid: str, k: int = 8) -> Trajectory:
    n = int(rng.integers(1, 60))
    chances = np.log(rng.dirichlet(np.ones(k + 2), size=n)).astype(np.float32)

    def nats() -> Any:
        return rng.normal(-1.0, 0.3, n).astype(np.float32)

    return Trajectory(
        rid=rid,
        arm="treated",
        prompt=rng.integers(2, 30, 7).astype(np.int32),
        tokens=rng.integers(2, 30, n).astype(np.int32),
        support_ids=np.stack([rng.permutation(np.arange(2, 36))[:k] for _ in range(n)]).astype(np.int32),
        teacher_logprobs=chances[:, :-1].copy(),
        teacher_tail=chances[:, -1].copy(),
        teacher_sampled=nats(),
        rollout_logprobs=nats(),
        sampling_logprobs=nats(),
        oldest_version=0,
    )


def add(student: TrainableStudent, batch: list[Trajectory], max_tokens: int = 128) -> list[float]:
    """Loss and diagnostics of the batch, whose gradients the student has then."""
    loss, seen = student.add_gradients(batch, pair(), max_tokens=max_tokens, busy=nullcontext, between=lambda: None)
    return [loss, *astuple(seen)]


def train(student: TrainableStudent, first: int, last: int, max_tokens: int = 128) -> list[list[float]]:
    """The steps from `first` up to `last`: the figures of each, the gradient's norm at the end."""
    found = []
    for step in range(first, last):
        figures = add(student, batch_of(step), max_tokens)
        found.append([*figures, student.clip()])
        student.step(RATE)
    return found


def state_of(student: TrainableStudent, step: int) -> CheckpointState:
    return student.capture(step=step, policy_version=step, consumed=("r1",), counters={"tokens_trained": 3})


# --- scenarios: each gets what makes the student, and returns what its file shows ---


def steps(make: Make, config: Config, folder: Path) -> Any:
    """Five steps; then everything that leaves a student."""
    student = make(MODEL, config)
    figures = train(student, 0, STEPS)
    save(folder / "steps-checkpoints", state_of(student, STEPS), keep=1)
    save_file(student.weights(torch.bfloat16), folder / "steps-weights.safetensors")
    student.write(folder / "steps-model")
    return figures


def resumed(make: Make, config: Config, folder: Path) -> Any:
    """From a checkpoint of one process, after three steps, to the end."""
    student = make(MODEL, config)
    found = load_newest(folder / "one-checkpoints")
    assert found is not None and found.step == 3
    student.restore(found)
    figures = train(student, 3, STEPS)
    save(folder / "resumed-checkpoints", state_of(student, STEPS), keep=1)
    return figures


def bfloat16(make: Make, config: Config, folder: Path) -> Any:
    """Each trajectory alone in its micro-batch: what is computed in bfloat16 is the same on any number of ranks."""
    return train(make(MODEL, config), 0, 2, max_tokens=1)


def not_finite(make: Make, config: Config, folder: Path) -> Any:
    """A share that is not finite on one rank shows on rank 0, and after forgetting it the others work as before."""
    student = make(MODEL, config)
    whole = batch_of(0)
    bad = [one for one in whole if one.rid == rid_of(1)]
    spoilt = add(student, whole), student.clip()
    student.forget_gradients()
    alone = add(student, bad)
    student.forget_gradients()
    rest = add(student, [one for one in whole if one not in bad])
    return {"spoilt": [*spoilt[0], spoilt[1]], "alone": alone, "rest": [*rest, student.clip()]}


def rid_of(rank: int) -> str:
    """A trajectory of the first batch that two ranks' deal gives to this one."""
    return balanced(batch_of(0), 2, max_tokens=1)[rank][0].rids[0]


def _spoil(rank: int, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Before the ranks are forked: change what the head gets for the micro-batches that hold this rank's trajectory."""
    kept, rid = gradients.kept_rows, rid_of(rank)

    def spoilt(model: Any, head: Any, micro: MicroBatch) -> torch.Tensor:
        rows = kept(model, head, micro)
        return how(rows) if rid in micro.rids else rows

    gradients.kept_rows = spoilt


def _no_memory(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")


def raises(make: Make, config: Config, folder: Path) -> Any:
    """An error in one rank's part ends the learner, with its words."""
    student = make(MODEL, config)
    try:
        add(student, batch_of(0))
    except RankFailed as failure:
        return {"failure": str(failure)}
    return None


def dies(make: Make, config: Config, folder: Path, others: Others, stop: threading.Event) -> Any:
    """A rank is killed while rank 0 waits for a batch: it is asked to stop, and nothing works any more."""
    student = make(MODEL, config)
    [pid] = others.pids.values()
    os.kill(pid, signal.SIGKILL)
    asked = stop.wait(10)
    try:
        state_of(student, 0)
    except RankFailed as failure:
        return {"asked": asked, "failure": str(failure)}
    return None


FORMS: dict[str, tuple[Callable[..., Any], int, str]] = {
    "steps": (steps, 2, "float32"),
    "again": (lambda make, config, folder: train(make(MODEL, config), 0, 3), 2, "float32"),
    "three": (lambda make, config, folder: train(make(MODEL, config), 0, 2), 3, "float32"),
    "resumed": (resumed, 2, "float32"),
    "bfloat16": (bfloat16, 2, "bfloat16"),
    "not_finite": (not_finite, 2, "float32"),
    "raises_0": (raises, 2, "float32"),
    "raises_1": (raises, 2, "float32"),
    "dies": (dies, 2, "float32"),
}


def play(folder: Path, name: str) -> None:
    act, ranks, dtype = FORMS[name]
    config, stop = settings(folder, ranks, dtype), threading.Event()
    if name == "not_finite":
        _spoil(1, lambda logits: logits * torch.nan)
    if name.startswith("raises"):
        _spoil(int(name[-1]), _no_memory)
    others = fork_others(config)
    more = (others, stop) if name == "dies" else ()
    found = None
    try:
        with others.lead(config, stop) as make:
            found = act(make, config, folder, *more)
    except RankFailed as failure:
        found = (found or {}) | {"at the end": str(failure)}
    left = [pid for pid in others.pids.values() if Path(f"/proc/{pid}").exists()]
    (folder / f"{name}.json").write_text(json.dumps({"found": found, "left": left}))


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    assert sharded and len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    for name in names:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                play(folder, name)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
