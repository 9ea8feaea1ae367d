"""Valid configs and records for tests, and a run whose roles are played step by step on a real Redis."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis

from common.config import Config
from common.wire import scripts
from common.wire.lease import Lease
from common.wire.messages import (
    ChunkLogprobs,
    ChunkSupport,
    ChunkTokens,
    FormerSupport,
    RolloutHead,
    ScoreDivergence,
    ScoreSupport,
    ScoreView,
    Verdict,
    support_digest,
)
from common.wire.plane import Plane, create_run, new_run_key, open_plane
from common.wire.scripts import Argument, Call, Ending, Fenced, Written

STAGES = {"prompts": "rollout", "scores": "arbiter", "trajectories": "learner", "finished": "books"}


def make_config(folder: Path, **overrides: dict[str, Any] | Any) -> Config:
    """A small valid config whose run lies in `folder`; overrides are given by section: `learner={"batch_size": 2}`."""
    tree: dict[str, Any] = {
        "name": "test",
        "runs_dir": str(folder),
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "rollout": {"max_completion_length": 64, "chunk_tokens": 8},
        "termination": {
            "window": 4,
            "patience": 2,
            "min_calibration": 4,
            "buffer_size": 16,
            "warmup_steps": 0,
            "control_fraction": 0.25,
        },
        "redis": {"shards": 4},
        "liveness": {"heartbeat_s": 0.1, "claim_s": 0.4, "lease_s": 3.0, "redis_wait_s": 20.0},
    }
    for name, value in overrides.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(tree)


def make_head(rid: str = "r1", **changes: Any) -> RolloutHead:
    values: dict[str, Any] = {
        "rid": rid,
        "arm": "treated",
        "problem": 0,
        "seed": 7,
        "max_new_tokens": 64,
        "step": None,
        "prompt": np.array([5, 6, 7], np.int32),
    }
    return RolloutHead(**values | changes)


def make_support(n: int = 3, k: int = 2) -> ChunkSupport:
    """What was sampled has probability 1/8, and 1/4 as it was sampled."""
    return ChunkSupport(
        support_ids=np.arange(n * k, dtype=np.int32).reshape(n, k),
        rollout_logprobs=np.full(n, np.log(1 / 8), np.float32),
        sampled_logprobs=np.full(n, np.log(1 / 4), np.float32),
    )


def make_logprobs(n: int = 3, k: int = 2, *, tail: bool = True) -> ChunkLogprobs:
    """Probabilities 1/8 on STOP, 1/8 on each of K outcomes, the rest in the tail."""
    rest = 1 - (k + 1) / 8
    return ChunkLogprobs(
        support_logprobs=np.full((n, k + 1), np.log(1 / 8), np.float32),
        tail_logprobs=np.full(n, np.log(rest), np.float32) if tail else None,
    )


def make_former_support(n: int = 3, k: int = 2, *, tail: bool = True) -> FormerSupport:
    """`make_support` and `make_logprobs` in the one record that they once were."""
    new, student = make_support(n, k), make_logprobs(n, k, tail=tail)
    return FormerSupport(
        new.support_ids,
        student.support_logprobs,
        student.tail_logprobs,
        new.rollout_logprobs,
        new.sampled_logprobs,
    )


def make_tokens(tokens: Sequence[int] = (1, 2, 3), **changes: Any) -> ChunkTokens:
    values: dict[str, Any] = {
        "seq": 0,
        "start": 0,
        "policy_version": 0,
        "finish": None,
        "writer": "n1",
        "digest": support_digest(make_support(len(tokens)).encode(), make_logprobs(len(tokens)).encode()),
        "tokens": np.array(tokens, np.int32),
    }
    return ChunkTokens(**values | changes)


def make_divergence(values: Sequence[float] = (0.5, 0.25, 0.0), seq: int = 0) -> ScoreDivergence:
    return ScoreDivergence(seq=seq, divergence=np.array(values, np.float32))


def make_view(values: Sequence[float] = (0.5, 0.25, 0.0), seq: int = 0) -> ScoreView:
    """Of tokens with these divergences: the entropy is their distance from 1, the margin three times below 0."""
    divergence = np.array(values, np.float32)
    student = np.full(len(divergence), -2.0, np.float32)
    return ScoreView(seq, np.stack((np.abs(1 - divergence), student, student - 3 * divergence)))


def make_score_support(n: int = 3, k: int = 2, *, tail: bool = True) -> ScoreSupport:
    student = make_logprobs(n, k, tail=tail)
    return ScoreSupport(student.support_logprobs, student.tail_logprobs, make_support(n, k).sampled_logprobs)


def make_own_support(n: int = 3, k: int = 2, own: int = 2) -> ScoreSupport:
    """Scores with outcomes that the teacher added."""
    ids = np.arange(k + 10, k + 10 + n * own, dtype=np.int32).reshape(n, own)
    return replace(make_score_support(n, k), own_ids=ids, own_logprobs=np.full((n, own), -2.5, np.float32))


def make_verdict(rid: str = "r1", **changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "rid": rid,
        "arm": "treated",
        "problem": 0,
        "finish_reason": "kl_trap",
        "trigger": 3,
        "keep": 2,
        "train": 2,
        "cut": True,
        "generated": None,
        "threshold": 0.25,
        "min_window": 0.125,
        "first_version": 0,
        "last_version": 1,
        "tokens": np.array([1, 2, 3], np.int32),
        "divergence": np.array([0.5, 0.25, 0.0], np.float32),
    }
    return Verdict(**values | changes)


def script(name: str, *args: Argument) -> Call[list[Any]]:
    """A call as it is on the wire, also one that no role makes; its reply is what the script answered."""
    return Call(name, args, list)


def fenced(name: str, *args: Argument) -> Fenced[list[Any]]:
    """Like `script`, of one that only the holder of a role's lease may run."""
    return Fenced(name, args, list)


@dataclass
class Run:
    """A run on a real Redis. Its methods call the scripts that feeder, workers, arbiter and learner call, and give
    back what these answered, word first."""

    config: Config
    plane: Plane
    leases: dict[str, Lease] = field(default_factory=dict)
    notices: dict[tuple[str, int], bytes] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # rollout → the cursor behind it
    teachers: dict[str, str] = field(default_factory=dict)  # rollout → its teacher

    @property
    def client(self) -> redis.Redis:
        return self.plane.client

    def key(self, name: str) -> str:
        return self.plane.key(name)

    def lease(self, role: str) -> Lease:
        if role not in self.leases:
            self.leases[role] = Lease(self.plane, role, 600.0)
            assert self.plane.call(scripts.lease(role, self.leases[role].token, 600_000, "take")).value == "ok"
        return self.leases[role]

    def by(self, role: str, call: Fenced[Any]) -> list[Any]:
        """What a script of a role's holder answered."""
        return self.lease(role).call(replace(call, read=list))

    def raw(self, call: Call[Any]) -> list[Any]:
        """What a script answered."""
        return self.plane.call(replace(call, read=list))

    # --- feeder ---

    def admit(self, rid: str = "r1", **changes: Any) -> bytes:
        """Once more for a rollout that was admitted is the same call once more."""
        number = self.numbers.setdefault(rid, len(self.numbers) + 1)
        head = make_head(rid, **changes)
        self.teachers[rid] = head.scored_by
        return bytes(self.by("feeder", scripts.admit(rid, head.encode(), number))[0])

    def book(self, rid: str, ledger_field: str, *entries: bytes) -> list[Any]:
        return self.by("feeder", scripts.book(rid, ledger_field, entries))

    # --- rollout worker ---

    def take(self, consumer: str = "w1", nonce: str = "n1", *, count: int = 8, idle_ms: int = 0) -> list[Any]:
        reply = self.raw(scripts.take(consumer, nonce, count, idle_ms, b"0-0"))
        return reply[2:] if reply[0] == b"ok" else reply

    def chunk(
        self,
        rid: str = "r1",
        nonce: str = "n1",
        *,
        seq: int = 0,
        start: int = 0,
        tokens: Sequence[int] = (1, 2, 3),
        finish: str | None = None,
        version: int = 0,
    ) -> list[Any]:
        record = make_tokens(tokens, seq=seq, start=start, finish=finish, policy_version=version)
        support, student = make_support(len(tokens)).encode(), make_logprobs(len(tokens)).encode()
        length = start + len(tokens)
        lane = self.lane(rid)
        return self.raw(scripts.chunk(rid, nonce, seq, record.encode(), support, student, lane, length, finish))

    def beat(self, rid: str = "r1", nonce: str = "n1", consumer: str = "w1") -> bytes:
        asked = [Written(rid, self.field(rid, "entry") or b"0-1", nonce)]
        return bytes(self.raw(scripts.beat(consumer, b"0-0", [], asked))[3])

    # --- teacher ---

    def notice(self, rid: str = "r1", seq: int = 0) -> bytes:
        """The entry of a chunk's notice, as a teacher is given it."""
        streams = [stream for name in self.plane.teachers for stream in self.plane.chunk_streams(name)]
        for _, (entry, values) in self.plane.read("teacher", "t1", streams, count=1000, block_s=0):
            self.notices[values[b"rid"].decode(), int(values[b"seq"])] = entry
        return self.notices[rid, seq]

    def score(self, rid: str = "r1", *, seq: int = 0, values: Sequence[float] = (0.5, 0.25, 0.0)) -> bytes:
        divergence = make_divergence(values, seq).encode()
        support = make_score_support(len(values)).encode()
        entry = self.notice(rid, seq)
        view = make_view(values, seq).encode() if self.config.stores_view else b""
        return bytes(self.raw(scripts.score(self.lane(rid), entry, rid, seq, divergence, support, view))[0])

    # --- arbiter ---

    def score_entries(self) -> list[bytes]:
        """What the arbiter was given and has not acknowledged, new entries included."""
        self.plane.read("arbiter", "arbiter", ["scores"], count=1000, block_s=0)
        return [entry for entry, _ in self.given("arbiter", "arbiter", "scores")]

    def verdict(
        self,
        rid: str = "r1",
        *,
        train: int = 2,
        stop: bool = False,
        minimum: str = "",
        size: int = 4,
        threshold: str = "inactive",
        entries: Sequence[bytes] | None = None,
        teacher: str = "",
    ) -> bytes:
        body = make_verdict(rid, train=train).encode()
        given = self.score_entries() if entries is None else entries
        least, limit = float(minimum) if minimum else None, None if threshold == "inactive" else float(threshold)
        call = scripts.verdict(rid, body, train, stop, least, size, limit, given, teacher)
        return bytes(self.by("arbiter", call)[0])

    # --- learner ---

    def trajectories(self) -> dict[str, bytes]:
        """Rollout id → entry, as the learner is given them."""
        self.plane.read("learner", "learner", ["trajectories"], count=1000, block_s=0)
        pending = self.given("learner", "learner", "trajectories")
        return {values[b"rid"].decode(): entry for entry, values in pending}

    def settle(self, rid: str, entry: bytes, ending: str = "trained", reason: str = "") -> list[Any]:
        return self.by("learner", scripts.settle([Ending(entry, rid, ending, reason, 0)]))

    # --- looking ---

    def lane(self, rid: str) -> str:
        """Where the chunks of a rollout go: to its teacher, of one that another admitted to the first. Asks nobody."""
        return self.plane.lane_of(rid, self.teachers.get(rid, self.plane.teachers[0]))

    def given(self, group: str, consumer: str, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """What a consumer was given and has not acknowledged, oldest first."""
        answer: Any = self.client.xreadgroup(group, consumer, {self.key(stream): "0"}, count=10_000)
        return [(entry, values or {}) for _, entries in answer for entry, values in entries]

    def field(self, rid: str, name: str) -> bytes | None:
        value = self.client.hget(self.key(f"rollout:{rid}"), name)
        return value if isinstance(value, bytes) else None

    def entries(self, stream: str) -> list[dict[str, str]]:
        """Fields of everything in a stream, as text (`body` left as its length)."""
        return [
            {name.decode(): str(len(value)) if name == b"body" else value.decode() for name, value in values.items()}
            for _, values in self.client.xrange(self.key(stream))
        ]

    def pending(self, stream: str) -> int:
        group = STAGES.get(stream, "teacher")
        return int(self.client.xpending(self.key(stream), group)["pending"])

    def ledger(self) -> dict[str, int]:
        return {name.decode(): int(value) for name, value in self.client.hgetall(self.key("ledger")).items()}

    def judged(self, rid: str = "r1", *, train: int = 2) -> bytes:
        """Carry a rollout from nothing to its verdict; returns the learner's entry, or b'' where it trains nothing."""
        self.admit(rid)
        self.take()
        self.chunk(rid, finish="eos")
        self.score(rid)
        assert self.verdict(rid, train=train) == b"ok"
        return self.trajectories().get(rid, b"")


def write_whole(run: Run, rid: str, *, until: int | None = None, nonce: str = "n1") -> bytes:
    """Write and score a rollout that was taken, in full chunks with supports of their full size, from where it stands
    up to `until` tokens (None: its full length). Returns the first reply that is not ok, or b"ok"."""
    rollout, k = run.config.rollout, run.config.termination.teacher_top_k
    length = rollout.max_completion_length
    at, seq = (int(run.field(rid, name) or 0) for name in ("length", "chunks"))
    while at < (length if until is None else until):
        n = min(rollout.chunk_tokens, length - at)
        finish = "length" if at + n == length else None
        tokens = make_tokens(range(n), seq=seq, start=at, finish=finish, writer="0" * 16).encode()
        shard = run.lane(rid)
        support, student = make_wide_support(n, k), make_wide_logprobs(n, k)
        parts = support.encode(), student.encode()
        reply = run.raw(scripts.chunk(rid, nonce, seq, tokens, *parts, shard, at + n, finish))
        if reply[0] != b"ok":
            return bytes(reply[0])
        scored = ScoreSupport(student.support_logprobs, student.tail_logprobs, support.sampled_logprobs).encode()
        divergence = make_divergence([0.5] * n, seq).encode()
        view = make_view([0.5] * n, seq).encode() if run.config.stores_view else b""
        score = scripts.score(shard, run.notice(rid, seq), rid, seq, divergence, scored, view)
        assert run.raw(score) == [b"ok"]
        at, seq = at + n, seq + 1
    return b"ok"


def make_wide_support(n: int, k: int) -> ChunkSupport:
    """Of any size, with ids that need 32 bits; what its numbers are does not matter."""
    return ChunkSupport(np.full((n, k), 1 << 16, np.int32), *(np.full(n, -1.0, np.float32) for _ in range(2)))


def make_wide_logprobs(n: int, k: int) -> ChunkLogprobs:
    """Likewise."""
    return ChunkLogprobs(np.full((n, k + 1), -1.0, np.float32), np.full(n, -1.0, np.float32))


def start_run(client: redis.Redis, config: Config) -> Run:
    """A run of a fresh key on a Redis that others may be using too."""
    run_key = new_run_key(config.name)
    create_run(client, config, run_key)
    return Run(config, open_plane(config, client, run_key))


def remove_run(run: Run) -> None:
    """Take everything of a run off Redis, and nothing else."""
    with contextlib.suppress(redis.exceptions.RedisError, OSError):
        keys = list(run.client.scan_iter(run.plane.prefix.replace("{", "[{]") + "*", count=1000))
        if keys:
            run.client.delete(*keys)
        run.client.close()
