"""Whether chunks that vLLM servers wrote were written by the weights that they name.

While the run is at work, its weights are copied as they are published, and rollouts are read now and then while they
are open. At the end the log-probabilities that a chunk came with are compared with those that the weights of its
version give: a plain forward, on the text so far. The answer of a server is all that the run itself has to go by.

Not exact: a server may keep what older weights have computed of an open text, and a version may be published twice, by
a learner and by the one after it. A mean over a chunk above MOST_NATS is neither. Versions next to each other are not
told apart here, but by tests/e2e/test_vllm_run.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.pretrained import find_model
from common.runfiles.names import WEIGHTS
from common.wire.messages import ChunkSupport, ChunkTokens, Floats, MessageError, RolloutHead
from common.wire.record import support_field, tokens_field
from common.wire.weights import BadWeights, read_pointer, verified
from ops.chaos.cluster import Cluster, RunEnded
from ops.chaos.records import Violation

STATEMENT = "written_by_its_version"
MOST_NATS = 0.1
"""The most that the mean of |log p of the chunk - log p by the weights of its version| over its tokens may be."""
_EVERY_S = 0.1
_AT_A_TIME = 24  # open rollouts that are followed
_MOST_ROLLOUTS = 1500
_MOST_BYTES = 2 << 30  # of weights; later versions are not copied then
_AWAY = (redis.exceptions.RedisError, OSError, RunEnded)


@dataclass(frozen=True, slots=True)
class SeenChunk:
    """A chunk as it was stored. tokens: int32 [n]; logprobs: float32 [n], of these tokens at temperature 1."""

    version: int
    tokens: NDArray[np.int32]
    logprobs: Floats


@dataclass(slots=True)
class Seen:
    """prompts and chunks (in their order, from the first) of rollouts, by rid; copies: of each version, a file for each
    set of weights that was published under its number."""

    prompts: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    chunks: dict[str, list[SeenChunk]] = field(default_factory=dict)
    copies: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add(self, rid: str, record: Mapping[bytes, bytes]) -> None:
        """What a rollout's record has now; nothing of one that cannot be read, which others report."""
        with contextlib.suppress(MessageError, KeyError):
            self.prompts.setdefault(rid, RolloutHead.decode(record[b"head"]).prompt)
            self.chunks[rid] = list(_chunks(record))


def _chunks(record: Mapping[bytes, bytes]) -> Iterator[SeenChunk]:
    seq = 0
    while (data := record.get(tokens_field(seq).encode())) is not None:
        tokens = ChunkTokens.decode(data)
        support = ChunkSupport.decode(record[support_field(seq).encode()])
        yield SeenChunk(tokens.policy_version, tokens.tokens, support.rollout_logprobs)
        seq += 1


class Witness:
    """Looks at a run while it is at work, in a thread. Use as a context manager; `seen` is whole after leaving it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self.seen = cluster, Seen()
        self._folder = cluster.harness_folder / "published"
        self._known: set[tuple[int, str]] = set()
        self._bytes = 0
        self._followed: set[str] = set()
        self._over = threading.Event()
        self.failed: Exception | None = None  # of its own accord: it has seen less than it should
        self._thread = threading.Thread(target=self._look_on, name="witness", daemon=True)

    def __enter__(self) -> Witness:
        self._folder.mkdir(parents=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def remove_copies(self) -> None:
        shutil.rmtree(self._folder)

    def _look_on(self) -> None:
        try:
            while not self._over.wait(_EVERY_S):
                with contextlib.suppress(*_AWAY):  # Redis, by a fault; what it misses is not looked at
                    self._copy()
                    self._read()
        except Exception as error:
            self.failed = error

    def _copy(self) -> None:
        with contextlib.suppress(BadWeights):  # torn on purpose, or older than what is kept
            if (found := read_pointer(self._cluster.plane.policy())) is None:
                return
            ref, _ = found
            if (ref.version, ref.sha256) in self._known or self._bytes > _MOST_BYTES:
                return
            data = verified(self._cluster.folder / WEIGHTS, ref)
            path = self._folder / f"v{ref.version:08d}-{ref.sha256[:12]}.safetensors"
            path.write_bytes(data)
            self.seen.copies[ref.version].append(path)
            self._known.add((ref.version, ref.sha256))
            self._bytes += len(data)

    def _read(self) -> None:
        plane, chunks = self._cluster.plane, self.seen.chunks
        open_now = self._cluster.open_rollouts()
        self._followed &= open_now
        # By a hash of the rid: neither those that are taken first nor the longest.
        new = sorted(open_now - set(chunks), key=lambda rid: hashlib.sha256(rid.encode()).digest())
        room = min(_AT_A_TIME - len(self._followed), _MOST_ROLLOUTS - len(chunks))
        self._followed.update(new[: max(0, room)])
        rids = sorted(self._followed)
        for rid, record in zip(rids, plane.rollouts(rids), strict=True):
            self.seen.add(rid, record)


@dataclass(frozen=True, slots=True)
class Distance:
    """Of a chunk: the mean over its tokens of |log p as stored - log p by the weights of its version|, in nats."""

    rid: str
    seq: int
    version: int
    nats: float


def distances(seen: Seen, student: str) -> list[Distance]:
    """Of every chunk whose version was copied; of several copies, to the nearest. `student`: a model's folder or id."""
    model = AutoModelForCausalLM.from_pretrained(find_model(student), dtype=torch.float32)
    texts: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for rid, chunks in seen.chunks.items():
        start = len(seen.prompts[rid])
        for seq, chunk in enumerate(chunks):
            texts[chunk.version][rid].append((seq, start))
            start += len(chunk.tokens)
    found: dict[tuple[str, int], Distance] = {}
    for version, rollouts in sorted(texts.items()):
        for path in seen.copies.get(version, []):
            model.load_state_dict(load_file(path), strict=False)
            for rid, places in rollouts.items():
                for one in _distances(model, seen, rid, places):
                    before = found.get((rid, one.seq))
                    if before is None or one.nats < before.nats:
                        found[rid, one.seq] = one
    return list(found.values())


@torch.inference_mode()
def _distances(model: torch.nn.Module, seen: Seen, rid: str, places: list[tuple[int, int]]) -> Iterator[Distance]:
    """`places`: chunks and where they start, all of the version that the model has."""
    chunks = seen.chunks[rid]
    text = torch.tensor(np.concatenate([seen.prompts[rid], *(chunk.tokens for chunk in chunks)]).astype(np.int64))
    rows = model(input_ids=text[None]).logits[0, :-1].double().log_softmax(-1)
    own = rows.gather(1, text[1:, None])[:, 0].numpy()
    for seq, start in places:
        chunk = chunks[seq]
        difference = np.abs(own[start - 1 : start - 1 + len(chunk.tokens)] - chunk.logprobs)
        yield Distance(rid, seq, chunk.version, float(difference.mean()))


def check_written(seen: Seen, student: str, poisoned: frozenset[str]) -> tuple[list[Violation], list[Distance]]:
    """What was written by other weights than it says; and all that was looked at. `poisoned`: not to be looked at."""
    found = [one for one in distances(seen, student) if one.rid not in poisoned]
    violations = [
        Violation(STATEMENT, one.rid, f"chunk {one.seq}: {one.nats:.3f} nats a token from version {one.version}")
        for one in found
        if not one.nats <= MOST_NATS
    ]
    if not found:
        violations.append(Violation(STATEMENT, "", "no chunk could be compared with the weights of its version"))
    return violations, found
