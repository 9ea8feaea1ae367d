"""The records in a run's folder: the fields of each file's lines, and their meaning.

    rollouts.jsonl  BookLine    feeder → all live views and reports: a rollout that ended
    traces.jsonl    Trace       feeder → report, replay, audit, checker: tokens and divergences of a verdict
    audit.jsonl     Audit       feeder → checker: who wrote which chunk
    trained.jsonl   Trained     learner → checker, feeder: which rollouts a step trained, and digests of their tokens

Lines of metrics.jsonl (learner) and eval.jsonl (evaluator) are plain objects with figures for trackers and reports.
`from_json` takes a parsed line, checks every field and raises ValueError, TypeError or KeyError; fields that older
folders lack have defaults, and unknown fields are ignored. Floats are finite, counts are not negative.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_type_hints

import numpy as np

from common.wire.messages import ARMS, Floats, Ints, Verdict, fired

ROLLOUTS, TRACES, AUDIT = "rollouts.jsonl", "traces.jsonl", "audit.jsonl"
METRICS, TRAINED, EVALUATIONS = "metrics.jsonl", "trained.jsonl", "eval.jsonl"
CONFIG, LEDGER, SUMMARY, WALL = "config.yaml", "ledger.json", "summary.json", "wall.json"

UNFINISHED = frozenset({"run_end", "lost"})
"""Reasons of drops by which the run ended a rollout, not the rollout itself or its policy."""
ENDS_BY_ITSELF = ("eos", "length")
"""Finish reasons of rollouts that no policy stopped."""
UNJUDGED = "unfinished"
"""The finish reason of rollouts that ended before their verdict."""

T = TypeVar("T")


# --- rollouts.jsonl ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BookLine:
    """A finished rollout. `ending`: trained | dropped | dead; `reason`: why it was dropped or is dead."""

    rid: str
    arm: str
    problem: int
    finish_reason: str
    ending: str
    reason: str
    active: bool  # whether the policy could have cut it
    tokens_generated: int
    tokens_kept: int
    tokens_trained: int
    tokens_detection: int
    tokens_overshoot: int
    threshold: float | None
    min_window: float | None
    policy_version_first: int
    policy_version_last: int
    staleness: int | None
    correct: bool | None
    # By Redis's clock; None if a record was broken or lost.
    admitted_unix_s: float | None = None
    verdict_unix_s: float | None = None
    ended_unix_s: float | None = None
    # None without a verdict, and in books that are older than this field.
    tokens_trainable: int | None = None

    @property
    def judged(self) -> bool:
        """Whether it had a verdict."""
        return self.finish_reason != UNJUDGED

    @property
    def stopped(self) -> bool:
        """Whether the policy stopped the writing."""
        return self.judged and self.finish_reason not in ENDS_BY_ITSELF

    @property
    def fired(self) -> bool:
        """Whether the policy fired, applied or not."""
        return fired(stopped=self.stopped, kept=self.tokens_kept, written=self.tokens_generated)

    @property
    def ended_by_run(self) -> bool:
        return self.ending == "dropped" and self.reason in UNFINISHED

    @property
    def compared(self) -> bool:
        """Whether it counts in the comparison of the arms: the policy could have cut it, the run did not end it."""
        return self.active and self.ending != "dead" and not self.ended_by_run

    @property
    def fate(self) -> str:
        """How it ended, in one word: trained, dead, or the reason of the drop."""
        return self.reason if self.ending == "dropped" else self.ending

    @property
    def ledger_field(self) -> str:
        return ledger_field(self.ending, self.reason)

    @classmethod
    def from_json(cls, tree: Any) -> BookLine:
        return _decoded(cls, tree)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ledger_field(ending: str, reason: str) -> str:
    """trained | dead | dropped:REASON, as the ledger counts them."""
    return f"dropped:{reason}" if ending == "dropped" else ending


# --- traces.jsonl -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trace:
    """A verdict. `stopped`: whether the policy stopped the writing (`cut` in the file).

    If the policy fired and stopped nothing (control arm, mask, shadow), `keep` and `trigger` say where it would have
    cut; if it did not fire, both are all tokens.
    """

    rid: str
    arm: str
    problem: int
    trigger: int
    keep: int
    train: int
    finish_reason: str
    stopped: bool
    threshold: float | None
    version: int  # that wrote its first token
    token_bytes: bytes  # int32, little-endian, [n]; bytes make two traces comparable
    divergence_bytes: bytes  # float32, little-endian, [n], nats

    @property
    def tokens(self) -> Ints:
        return np.frombuffer(self.token_bytes, dtype="<i4")

    @property
    def divergence(self) -> Floats:
        return np.frombuffer(self.divergence_bytes, dtype="<f4")

    @property
    def written(self) -> int:
        """Number of recorded tokens."""
        return len(self.token_bytes) // 4

    @property
    def fired(self) -> bool:
        """Whether the policy fired, applied or not."""
        return fired(stopped=self.stopped, kept=self.keep, written=self.written)

    @classmethod
    def of(cls, verdict: Verdict) -> Trace:
        return cls(
            rid=verdict.rid,
            arm=verdict.arm,
            problem=verdict.problem,
            trigger=verdict.trigger,
            keep=verdict.keep,
            train=verdict.train,
            finish_reason=verdict.finish_reason,
            stopped=verdict.stopped,
            threshold=verdict.threshold,
            version=verdict.first_version,
            token_bytes=verdict.tokens.astype("<i4").tobytes(),
            divergence_bytes=verdict.divergence.astype("<f4").tobytes(),
        )

    @classmethod
    def from_json(cls, tree: Any) -> Trace:
        tree = _object(tree)
        tokens, divergence = (_bytes(tree, name) for name in ("tokens", "divergence"))
        others = {"stopped": tree["cut"], "token_bytes": "", "divergence_bytes": ""}
        trace = _decoded(cls, tree | others, token_bytes=tokens, divergence_bytes=divergence)
        if trace.arm not in ARMS:
            raise ValueError(f"arm is {trace.arm!r:.40}")
        if len(tokens) != len(divergence) or len(tokens) % 4:
            raise ValueError(f"{len(tokens) / 4:g} tokens with {len(divergence) / 4:g} divergences")
        return trace

    def to_json(self) -> dict[str, Any]:
        """Tokens and divergences exact, as base64."""
        return {
            "rid": self.rid,
            "arm": self.arm,
            "problem": self.problem,
            "trigger": self.trigger,
            "keep": self.keep,
            "train": self.train,
            "finish_reason": self.finish_reason,
            "cut": self.stopped,
            "threshold": self.threshold,
            "version": self.version,
            "tokens": base64.b64encode(self.token_bytes).decode(),
            "divergence": base64.b64encode(self.divergence_bytes).decode(),
        }


def _bytes(tree: Mapping[str, Any], name: str) -> bytes:
    return base64.b64decode(_typed(tree[name], str, name), validate=True)


# --- audit.jsonl ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk as it was stored when its rollout was booked. `divergence`: digest, None where it was not scored."""

    seq: int
    broken: str | None = None
    start: int = 0
    n: int = 0
    version: int = 0
    writer: str = ""
    finish: str | None = None
    tokens: str = ""
    divergence: str | None = None

    @classmethod
    def from_json(cls, tree: Any) -> Chunk:
        if "broken" not in _object(tree):
            for one in fields(cls):
                if one.name != "broken":
                    tree[one.name]
        return _decoded(cls, tree)

    def to_json(self) -> dict[str, Any]:
        if self.broken is not None:
            return {"seq": self.seq, "broken": self.broken}
        return {name: value for name, value in asdict(self).items() if name != "broken"}


@dataclass(frozen=True, slots=True)
class Audit:
    """A rollout's hash when it was booked."""

    rid: str
    owners: list[tuple[str, int]]  # nonce and first chunk of every owner, in order
    chunks: list[Chunk]
    threshold: str | None
    verdict: bool

    @classmethod
    def from_json(cls, tree: Any) -> Audit:
        tree = _object(tree)
        return cls(
            rid=_typed(tree["rid"], str, "rid"),
            owners=[(_typed(nonce, str, "owners"), _typed(first, int, "owners")) for nonce, first in tree["owners"]],
            chunks=[Chunk.from_json(chunk) for chunk in _typed(tree["chunks"], list, "chunks")],
            threshold=None if tree["threshold"] is None else _typed(tree["threshold"], str, "threshold"),
            verdict=_typed(tree["verdict"], bool, "verdict"),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "rid": self.rid,
            "owners": [[nonce, first] for nonce, first in self.owners],
            "chunks": [chunk.to_json() for chunk in self.chunks],
            "threshold": self.threshold,
            "verdict": self.verdict,
        }


# --- trained.jsonl ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """The rollouts of an optimizer step: id, number of tokens and their digest, for each."""

    step: int
    policy_version: int
    rids: list[str]
    tokens: list[int]
    digests: list[str]

    @classmethod
    def from_json(cls, tree: Any) -> Trained:
        tree = _object(tree)
        lists = {
            name: [_typed(one, kind, name) for one in _typed(tree[name], list, name)]
            for name, kind in (("rids", str), ("tokens", int), ("digests", str))
        }
        if len({len(found) for found in lists.values()}) > 1:
            raise ValueError(", ".join(f"{len(found)} {name}" for name, found in lists.items()))
        return _decoded(cls, tree, **lists)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# --- decoding ---------------------------------------------------------------------------------------------------------


def _object(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object, found {type(tree).__name__}")
    return tree


def _typed(value: Any, kind: type[T], name: str) -> T:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r:.60}, expected {kind.__name__}")
    return value


@cache
def _plan(cls: Any) -> tuple[tuple[str, frozenset[type], bool, str], ...]:
    """For each field with a JSON type: name, types, whether it may be missing, and the name of the types."""
    hints, plan = get_type_hints(cls), []
    for one in fields(cls):
        hint = hints[one.name]
        kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,))
        if kinds <= {str, int, float, bool, NoneType}:
            # JSON has one kind of number: 1 also means 1.0.
            allowed = kinds | {int} if float in kinds else kinds
            plan.append(
                (one.name, frozenset(allowed), one.default is not MISSING, getattr(hint, "__name__", str(hint)))
            )
    return tuple(plan)


def _decoded(cls: type[T], tree: Any, **given: Any) -> T:
    """The record; `given` has the fields that are decoded already. Raises ValueError."""
    tree = _object(tree)
    values = dict(given)
    for name, kinds, optional, called in _plan(cast(Any, cls)):
        if name not in tree:
            if optional:
                continue
            raise ValueError(f"{name} is missing")
        value = values[name] = tree[name]
        kind = type(value)
        if kind not in kinds:
            raise ValueError(f"{name} is {value!r:.60}, expected {called}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
        if kind is int and value < 0 and float not in kinds:
            raise ValueError(f"{name} is {value}, below 0")
    return cls(**values)
