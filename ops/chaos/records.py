"""The files of a finished run as the checker reads them: a line at a time, what is broken noted and left out."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.books import BookLine
from common.config import Config, ConfigError, load
from common.messages import ARMS, Floats, Ints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Violation:
    """One statement that does not hold. `rid` is empty where it concerns no single rollout."""

    statement: str
    rid: str
    detail: str


@dataclass(frozen=True, slots=True)
class Trace:
    """A line of traces.jsonl: a verdict."""

    rid: str
    arm: str
    problem: int
    trigger: int
    keep: int
    train: int
    cut: bool
    finish_reason: str
    threshold: float | None
    version: int
    token_bytes: bytes  # kept as bytes, so that two traces can be compared
    divergence_bytes: bytes

    @property
    def tokens(self) -> Ints:
        return np.frombuffer(self.token_bytes, dtype="<i4")

    @property
    def divergence(self) -> Floats:
        return np.frombuffer(self.divergence_bytes, dtype="<f4")


@dataclass(frozen=True, slots=True)
class Step:
    """A line of trained.jsonl: an optimizer step."""

    step: int
    policy_version: int
    rids: list[str]
    tokens: list[int]
    digests: list[str]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a line of metrics.jsonl says of the same step."""

    step: int
    policy_version: int
    trajectories: int
    tokens_trained: int


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


@dataclass(frozen=True, slots=True)
class Audit:
    """A line of audit.jsonl: a rollout's hash when it was booked."""

    rid: str
    owners: list[tuple[str, int]]  # nonce and first chunk of every take, in order
    chunks: list[Chunk]
    threshold: str | None
    verdict: bool


@dataclass(slots=True)
class Records:
    """A run's files, as far as they can be read; `broken` says what cannot."""

    config: Config | None = None
    ledger: dict[str, int] | None = None  # by ledger field, with `admitted` and `open`
    booked: Counter[str] = field(default_factory=Counter)  # lines by rid
    books: dict[str, BookLine] = field(default_factory=dict)  # the first line of each
    traces: dict[str, Trace] = field(default_factory=dict)
    judged_again: list[Trace] = field(default_factory=list)  # second traces that differ from the first
    steps: list[Step] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    audited: bool = False
    broken: list[Violation] = field(default_factory=list)


_FILES = (
    "config.yaml",
    "ledger.json",
    "rollouts.jsonl",
    "traces.jsonl",
    "trained.jsonl",
    "metrics.jsonl",
    "audit.jsonl",
)


def read_records(folder: Path, *names: str) -> Records:
    """Read some files of a run's folder; all without names."""
    records, wanted = Records(), set(names or _FILES)
    if "config.yaml" in wanted:
        try:
            records.config = load(folder / "config.yaml")
        except ConfigError as error:
            records.broken.append(Violation("record", "", str(error)))
    if "ledger.json" in wanted:
        try:
            records.ledger = _ledger(json.loads((folder / "ledger.json").read_bytes()))
        except (OSError, *_BROKEN) as error:
            records.broken.append(Violation("record", "", f"ledger.json: {_shown(error)}"))
    optional = {"audit.jsonl"}
    if records.config is None or not records.config.feeder.record_traces:
        optional.add("traces.jsonl")
    for name, take in (
        ("rollouts.jsonl", _take_line),
        ("traces.jsonl", _take_trace),
        ("trained.jsonl", lambda records, raw: records.steps.append(_step(json.loads(raw)))),
        ("metrics.jsonl", lambda records, raw: records.measured.append(_measured(json.loads(raw)))),
        ("audit.jsonl", lambda records, raw: records.audits.append(_audit(json.loads(raw)))),
    ):
        if name in wanted:
            _read_lines(folder / name, records, take, optional=name in optional)
    records.audited = (folder / "audit.jsonl").exists()
    return records


_BROKEN = (ValueError, TypeError, KeyError, RecursionError)


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _read_lines(path: Path, records: Records, take: Callable[[Records, bytes], None], *, optional: bool) -> None:
    """Take in each whole line; a torn last one was never acknowledged and is left out."""
    if not path.exists():
        if not optional:
            records.broken.append(Violation("record", "", f"{path.name}: missing"))
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                take(records, raw)
            except _BROKEN as error:
                records.broken.append(Violation("record", "", f"{path.name}:{number}: {_shown(error)}"))


def _take_line(records: Records, raw: bytes) -> None:
    line = _book_line(json.loads(raw))
    records.booked[line.rid] += 1
    records.books.setdefault(line.rid, line)


def _take_trace(records: Records, raw: bytes) -> None:
    trace = _trace(json.loads(raw))
    if records.traces.setdefault(trace.rid, trace) != trace:
        records.judged_again.append(trace)


def _typed(value: Any, wanted: type[T], name: str) -> T:
    if type(value) is not wanted:
        raise ValueError(f"{name}: {value!r:.40} is no {wanted.__name__}")
    return value


def _whole(tree: dict[str, Any], name: str) -> int:
    number = _typed(tree[name], int, name)
    if number < 0:
        raise ValueError(f"{name}: {number} is below 0")
    return number


def _text(tree: dict[str, Any], name: str) -> str:
    return _typed(tree[name], str, name)


def _optional(value: Any, wanted: type[T], name: str) -> T | None:
    return None if value is None else _typed(value, wanted, name)


def _ledger(tree: Any) -> dict[str, int]:
    dropped = _typed(_typed(tree, dict, "ledger")["dropped"], dict, "dropped")
    counts = {name: _typed(tree[name], int, name) for name in ("admitted", "trained", "dead", "open")}
    return counts | {f"dropped:{reason}": _whole(dropped, reason) for reason in dropped}


_NUMBERS = tuple(one.name for one in fields(BookLine) if one.type == "int")
_TEXTS = tuple(one.name for one in fields(BookLine) if one.type == "str")


def _book_line(tree: Any) -> BookLine:
    line = BookLine(**_typed(tree, dict, "line"))
    for name in _NUMBERS:
        _whole(tree, name)
    for name in _TEXTS:
        _text(tree, name)
    _optional(line.staleness, int, "staleness")
    _optional(line.tokens_trainable, int, "tokens_trainable")
    _optional(line.threshold, float, "threshold")
    _optional(line.min_window, float, "min_window")
    return line


def _trace(tree: Any) -> Trace:
    if tree["arm"] not in ARMS:
        raise ValueError(f"arm: {tree['arm']!r:.40}")
    trace = Trace(
        rid=_text(tree, "rid"),
        arm=_text(tree, "arm"),
        problem=_whole(tree, "problem"),
        trigger=_whole(tree, "trigger"),
        keep=_whole(tree, "keep"),
        train=_whole(tree, "train"),
        cut=_typed(tree["cut"], bool, "cut"),
        finish_reason=_text(tree, "finish_reason"),
        threshold=_optional(tree["threshold"], float, "threshold"),
        version=_whole(tree, "version"),
        token_bytes=base64.b64decode(_text(tree, "tokens"), validate=True),
        divergence_bytes=base64.b64decode(_text(tree, "divergence"), validate=True),
    )
    tokens, divergence = trace.tokens, trace.divergence
    if len(tokens) != len(divergence) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(divergence)} divergences")
    if not (np.isfinite(divergence).all() and (divergence >= 0).all()):
        raise ValueError("divergence: not finite, or below 0")
    return trace


def _step(tree: Any) -> Step:
    rids = [_typed(rid, str, "rids") for rid in _typed(tree["rids"], list, "rids")]
    tokens = [_typed(count, int, "tokens") for count in _typed(tree["tokens"], list, "tokens")]
    digests = [_typed(digest, str, "digests") for digest in _typed(tree["digests"], list, "digests")]
    if not len(rids) == len(tokens) == len(digests):
        raise ValueError(f"{len(rids)} rids, {len(tokens)} tokens, {len(digests)} digests")
    return Step(_whole(tree, "step"), _whole(tree, "policy_version"), rids, tokens, digests)


def _measured(tree: Any) -> Measured:
    return Measured(*(_whole(tree, name) for name in ("step", "policy_version", "trajectories", "tokens_trained")))


def _audit(tree: Any) -> Audit:
    return Audit(
        rid=_text(tree, "rid"),
        owners=[(_typed(nonce, str, "owners"), _typed(first, int, "owners")) for nonce, first in tree["owners"]],
        chunks=[_chunk(chunk) for chunk in _typed(tree["chunks"], list, "chunks")],
        threshold=_optional(tree["threshold"], str, "threshold"),
        verdict=_typed(tree["verdict"], bool, "verdict"),
    )


def _chunk(tree: Any) -> Chunk:
    if "broken" in tree:
        return Chunk(_whole(tree, "seq"), _text(tree, "broken"))
    return Chunk(
        seq=_whole(tree, "seq"),
        start=_whole(tree, "start"),
        n=_whole(tree, "n"),
        version=_whole(tree, "version"),
        writer=_text(tree, "writer"),
        finish=_optional(tree["finish"], str, "finish"),
        tokens=_text(tree, "tokens"),
        divergence=_optional(tree["divergence"], str, "divergence"),
    )
