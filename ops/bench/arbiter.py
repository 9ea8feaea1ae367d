"""The arbiter's own work: the real one over a real Redis, on recorded divergences, and the policy alone."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from actors.arbiter import Arbiter
from common.config import Config
from common.draws import rollout_seed, uniform_bits
from common.policies import Calibrated, Policy, Progress, Situation, extremes, find
from common.rids import rid_of
from common.termination import MinimaBuffer
from common.wire import scripts
from common.wire.connect import connect
from common.wire.lease import Lease
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    support_digest,
)
from common.wire.plane import Plane, create_run, new_run_key, open_plane
from ops.bench.recorded import RecordedChunk, RecordedRollout, record
from ops.bench.speed import machine, spread
from ops.reach.embedded import EmbeddedRedis
from ops.reach.run import with_redis

_RECORDED = 64  # rollouts that are replayed
_IN_FLIGHT = 256  # rollouts whose next chunks are scored between two steps of the arbiter
_FIGURES = {
    "step.tokens_per_s": "tokens by the seconds of Arbiter.step, waiting for Redis included",
    "step.tokens_per_cpu_s": "tokens by the processor seconds that Arbiter.step took in its own process",
    "policy.tokens_per_s": "tokens by the processor seconds of the policy alone, fed chunk by chunk",
}


def arbiter(config: Config, repeats: int) -> dict[str, Any]:
    """Tokens a second of `Arbiter.step` and of the policy, for rollouts in flight that each have one new chunk."""
    recorded = record(config, _RECORDED)
    threshold = _threshold(config, recorded)
    judged = [_judge_alone(config, recorded, threshold) for _ in range(repeats + 1)][1:]  # the first warms up
    with tempfile.TemporaryDirectory(prefix="katana-bench-") as folder:
        server = EmbeddedRedis(Path(folder) / "redis", maxmemory_mb=1024)
        server.start()
        try:
            there = with_redis(config.model_copy(update={"name": "bench", "runs_dir": folder}), server.url, None)
            steps = [_judge_in_redis(there, recorded, threshold) for _ in range(repeats + 1)][1:]
        finally:
            server.stop()
    return {
        "what": "the arbiter's work",
        "policy_name": config.termination.policy,
        "threshold": threshold,
        "chunk_tokens": config.rollout.chunk_tokens,
        "rollouts_in_flight": _IN_FLIGHT,
        "step": {name: spread([one[name] for one in steps]) for name in steps[0]},
        "policy": {"tokens_per_s": spread(judged)},
        "figures": _FIGURES,
        "machine": machine(),
    }


def _threshold(config: Config, recorded: list[RecordedRollout]) -> float | None:
    """For the calibrated policies the quantile of the recorded extremes; for others the policy's own number."""
    settings, policy = config.termination, find(config.termination.policy)
    found = []
    for rollout in recorded:
        rule = extremes(settings)
        for one in rollout.chunks:
            rule.feed(one.read.row(policy.windows_of))
        if rule.min_window is not None:
            found.append(rule.min_window)
    minima = MinimaBuffer(max(len(found), settings.min_calibration))
    for _ in range(-(-settings.min_calibration // max(1, len(found)))):
        for value in found:
            minima.push(value)
    if issubclass(policy, Calibrated) and not found:
        return None
    return policy.number(settings, Progress(settings.warmup_steps, 0, minima))


# --- the policy alone --------------------------------------------------------------------------------------------


def _judge_alone(config: Config, recorded: list[RecordedRollout], threshold: float | None) -> float:
    settings, most = config.termination, config.rollout.max_completion_length
    policy = find(settings.policy)
    began, tokens = time.process_time(), 0
    for number, rollout in enumerate(recorded):
        situation = Situation(threshold, rollout_seed(config.seed, number), most)
        judge: Policy = policy(settings, situation)
        for one in rollout.chunks:
            tokens += len(one.divergence)
            if judge.feed_tokens(one.read) is not None:
                break
    return tokens / (time.process_time() - began)


# --- the arbiter on Redis ----------------------------------------------------------------------------------------


def _judge_in_redis(config: Config, recorded: list[RecordedRollout], threshold: float | None) -> dict[str, float]:
    client: Any = connect(str(config.redis.url))
    client.flushdb()  # of the bench's own server
    run_key = new_run_key(config.name)
    create_run(client, config, run_key)
    stage = _Stage(config, open_plane(config, client, run_key), recorded)
    stage.admit(threshold)
    own = connect(str(config.redis.url))
    judge = Arbiter(config, open_plane(config, own, run_key), threading.Event())
    judge.open()
    seconds = cpu = 0.0
    tokens = chunks = 0
    for seq in range(max(len(rollout.chunks) for rollout in recorded)):
        scored = stage.score(seq)
        tokens, chunks = tokens + sum(len(one.divergence) for one in scored), chunks + len(scored)
        wall_began, cpu_began = time.perf_counter(), time.process_time()
        while judge.step(block_s=0.0):
            pass
        seconds += time.perf_counter() - wall_began
        cpu += time.process_time() - cpu_began
    judge.close()
    return {"tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / cpu, "chunks_per_s": chunks / seconds}


class _Stage:
    """Plays feeder, rollout worker and teacher worker for rollouts in flight, from the recording."""

    def __init__(self, config: Config, plane: Plane, recorded: list[RecordedRollout]) -> None:
        self._config, self._plane = config, plane
        self._rollouts = {rid_of(n): recorded[n % len(recorded)] for n in range(_IN_FLIGHT)}
        self._over: set[str] = set()

    def admit(self, threshold: float | None) -> None:
        plane, config = self._plane, self._config
        lease = Lease(plane, "feeder", 3600.0)
        lease.acquire(threading.Event())
        shown = "inactive" if threshold is None else repr(threshold)
        control = config.termination.control_fraction
        heads = [
            RolloutHead(
                rid=rid,
                arm="treated" if uniform_bits(config.seed, "arm", number) / 2**64 >= control else "control",
                problem=number,
                seed=rollout_seed(config.seed, number),
                max_new_tokens=config.rollout.max_completion_length,
                step=None,
                prompt=rollout.prompt,
            )
            for number, (rid, rollout) in enumerate(self._rollouts.items())
        ]
        lease.call_all([scripts.admit(head.rid, head.encode(), number + 1, shown) for number, head in enumerate(heads)])
        plane.call(scripts.take("bench", "n0", len(heads), 0, b"0-0"))

    def score(self, seq: int) -> list[RecordedChunk]:
        """Store and score chunk `seq` of every rollout that is not over; returns those that were stored."""
        plane = self._plane
        going = [
            (rid, rollout.chunks[seq])
            for rid, rollout in self._rollouts.items()
            if rid not in self._over and seq < len(rollout.chunks)
        ]
        stored = plane.call_all([self._chunk_call(rid, seq, one) for rid, one in going])
        going = [pair for pair, answer in zip(going, stored, strict=True) if answer.word is scripts.ChunkAnswer.OK]
        self._over = set(self._rollouts) - {rid for rid, _ in going}
        streams = plane.chunk_streams()
        entries = {
            values[b"rid"].decode(): entry
            for _, (entry, values) in plane.read("teacher", "bench", streams, count=_IN_FLIGHT, block_s=0.0)
        }
        plane.call_all([self._score_call(rid, entries[rid], seq, one) for rid, one in going])
        return [one for _, one in going]

    def _chunk_call(self, rid: str, seq: int, one: RecordedChunk) -> scripts.Call[scripts.Stored]:
        chunk = one.chunk
        support = ChunkSupport(chunk.support_ids, chunk.rollout_logprobs, chunk.sampled_logprobs).encode()
        logprobs = ChunkLogprobs(chunk.support_logprobs, chunk.tail_logprobs).encode()
        digest = support_digest(support, logprobs)
        tokens = ChunkTokens(seq, chunk.start, 0, chunk.finish, "n0", digest, np.asarray(chunk.tokens, np.int32))
        length = chunk.start + len(chunk.tokens)
        lane = self._plane.lane_of(rid)
        return scripts.chunk(rid, "n0", seq, tokens.encode(), support, logprobs, lane, length, chunk.finish)

    def _score_call(self, rid: str, entry: bytes, seq: int, one: RecordedChunk) -> scripts.Call[scripts.ScoreAnswer]:
        divergence = ScoreDivergence(seq, one.divergence).encode()
        teacher = ScoreSupport(one.scored.teacher_logprobs, one.scored.tail_logprobs, one.scored.sampled).encode()
        view = ScoreView(seq, one.view).encode() if self._config.stores_view else b""
        return scripts.score(self._plane.lane_of(rid), entry, rid, seq, divergence, teacher, view)
