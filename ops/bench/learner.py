"""The learner's step: tokens a second through forward, backward and optimizer, and the memory that it takes."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.placing import with_learner_here
from common.config import Config
from common.draws import uniform_bits
from common.pretrained import check_pair
from common.wire.connect import connect
from common.wire.plane import create_run, new_run_key, open_plane
from learner.batch import Trajectory
from learner.drift import repetition
from learner.intake import Received
from learner.train import Learner
from ops.bench.recorded import RecordedRollout, record
from ops.bench.resident import peak_mb
from ops.bench.speed import machine, spread
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import with_redis

_STEPS = 4  # of a repeat
_FIGURES = {
    "tokens_per_s": "kept tokens trained on, by the seconds of a whole step, the journal's line included",
    "gradients_per_s": "kept tokens by the seconds of gradients and diagnostics alone",
    "peak_memory_mb": "the most memory of the process so far (CPU: resident; CUDA: allocated on the device)",
}


def learner(config: Config, repeats: int) -> dict[str, Any]:
    """Steps on recorded batches of the config's size; weights are published to nobody, and checkpoints are not written.

    The recorded rollouts are whole: nothing is cut.
    """
    config = with_learner_here(config)
    size = config.learner.batch_size
    trajectories = [trajectory_of(one, number, config) for number, one in enumerate(record(config, 2 * size))]
    found = measure_steps(config, trajectories, repeats)
    return {
        "what": "the learner's step",
        "batch_size": size,
        "micro_batch_tokens": config.learner.micro_batch_tokens,
        "tokens_a_step": sum(len(one.tokens) for one in trajectories) // 2,
        **{name: spread([one[name] for one in found]) for name in found[0]},
        "peak_memory_mb": peak_mb(config.learner.device),
        "figures": _FIGURES,
        "machine": machine(),
    }


def trajectory_of(rollout: RecordedRollout, number: int, config: Config) -> Trajectory:
    """A recorded rollout as the learner reads it from Redis, whole."""
    chunks = rollout.chunks

    def joined(values: list[Any]) -> Any:
        return np.concatenate(values)

    tokens = joined([one.chunk.tokens for one in chunks])
    tails = [one.scored.tail_logprobs for one in chunks]
    control = uniform_bits(config.seed, "arm", number) / 2**64 < config.termination.control_fraction
    return Trajectory(
        rid=f"r{number:09d}",
        arm="control" if control else "treated",
        prompt=rollout.prompt,
        tokens=tokens,
        support_ids=joined([one.chunk.support_ids for one in chunks]),
        teacher_logprobs=joined([one.scored.teacher_logprobs for one in chunks]),
        teacher_tail=None if tails[0] is None else joined(tails),
        teacher_sampled=joined([one.scored.sampled for one in chunks]),
        rollout_logprobs=joined([one.chunk.rollout_logprobs for one in chunks]),
        sampling_logprobs=joined([one.chunk.sampled_logprobs for one in chunks]),
        oldest_version=0,
        generated=len(tokens),
        finish_reason=chunks[-1].chunk.finish or "",
        repetition=repetition(tokens, int(tokens.max()) + 1),
        entropy=joined([one.view[0] for one in chunks]) if config.loss.weighting == "entropy" else None,
    )


def _of_steps(config: Config, folder: str, repeats: int) -> Config:
    """The config with as many steps as are measured, and nothing written between them."""
    steps = (repeats + 1) * _STEPS + 1
    changes = {"max_steps": steps, "weight_sync_steps": steps, "max_generated_tokens": None}
    settings = config.learner.model_copy(update=changes)
    checkpoints = config.checkpoints.model_copy(update={"every_steps": steps})
    update = {"name": "bench", "runs_dir": folder, "learner": settings, "checkpoints": checkpoints}
    return config.model_copy(update={**update, "deterministic": False})


def measure_steps(config: Config, trajectories: list[Trajectory], repeats: int) -> list[dict[str, float]]:
    """Speeds of each repeat, by a real learner on a Redis of its own. `trajectories`: of two batches, in turn."""
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        server = EmbeddedRedis(Path(folder) / "redis", maxmemory_mb=64)
        server.start()
        try:
            return _measure(with_redis(_of_steps(config, folder, repeats), server.url, None), trajectories, repeats)
        finally:
            server.stop()


def _measure(config: Config, trajectories: list[Trajectory], repeats: int) -> list[dict[str, float]]:
    client: Any = connect(str(config.redis.url))
    run_key = new_run_key(config.name)
    create_run(client, config, run_key)
    config.run_dir.mkdir(parents=True)
    one = Learner(config, open_plane(config, client, run_key), check_pair(config), threading.Event())
    one.open()
    one.start()
    size, found = config.learner.batch_size, []
    for repeat in range(repeats + 1):
        steps = gradients = 0.0
        tokens = 0
        for number in range(_STEPS):
            batch = trajectories[:size] if number % 2 else trajectories[size:]
            began = time.perf_counter()
            one._gradients(batch)
            _wait(config)
            between = time.perf_counter()
            one.student.forget_gradients()
            began_step = time.perf_counter()
            one.step([Received(b"0-1", trajectory) for trajectory in batch])
            _wait(config)
            steps, gradients = steps + time.perf_counter() - began_step, gradients + between - began
            tokens += sum(len(trajectory.tokens) for trajectory in batch)
        if repeat:  # the first warms up
            found.append({"tokens_per_s": tokens / steps, "gradients_per_s": tokens / gradients})
    one.close()
    client.close()
    return found


def _wait(config: Config) -> None:
    if config.learner.device.startswith("cuda"):
        torch.cuda.synchronize(config.learner.device)
