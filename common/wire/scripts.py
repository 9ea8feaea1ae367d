"""The scripts of `lua/`, one function each, of its name: typed arguments in, a call that reads its reply out.

Arguments stand in the order of the script's header, but for the lease: scripts of a role's holder alone are `Fenced`,
and the lease puts itself in. A trip is a list of calls, and what comes back is a list of replies that have been read
(`Plane.call`, `Plane.call_all`, `Lease.call`, `Lease.call_all`). What Redis stores may be broken: fields of a record
are handed on as they are, and whoever uses them checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import redis

NAMES = (
    *("admit", "take", "beat", "release", "chunk", "count", "claim", "attempt", "score", "verdict"),
    *("settle", "book", "restore", "fail", "again", "reopen", "publish", "advance", "lease", "adopt", "close"),
    *("seen", "gone", "sweep", "refused"),
)
Entry = tuple[bytes, dict[bytes, bytes]]
Argument = str | int | bytes
R = TypeVar("R")


class UnexpectedReply(RuntimeError):
    """A script answered what its header does not name."""


# --- calls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """A script to be run, and how its reply is read."""

    script: str
    args: tuple[Argument, ...]
    read: Callable[[list[Any]], R]


@dataclass(frozen=True, slots=True)
class Fenced(Generic[R]):
    """A script that only the holder of a role's lease may run; `names_role`: it may be one of several roles."""

    script: str
    args: tuple[Argument, ...]
    read: Callable[[list[Any]], R]
    names_role: bool = False

    def by(self, role: str, token: str) -> Call[R | None]:
        """The call by a holder; its reply is None where the lease is not that one's any more. No `read` gives None."""
        fence = (role, token) if self.names_role else (token,)
        return Call(self.script, (*fence, *self.args), lambda reply: None if reply[0] == b"lost" else self.read(reply))


def answered(answer: Any) -> list[Any]:
    """A script's reply; refused for want of memory it is ["full"], other errors are raised."""
    if isinstance(answer, redis.exceptions.ResponseError) and "OOM" in str(answer):
        return [b"full"]
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def run_is_gone(reply: list[Any]) -> bool:
    """Any script may say so: Redis no longer knows the run."""
    return bool(reply[0] == b"gone")


# --- words that scripts answer with ----------------------------------------------------------------------------


class Admitted(Enum):
    OK = "ok"
    FULL = "full"
    ENDED = "ended"
    TAKEN = "taken"  # the request is not there any more
    BEHIND = "behind"  # Redis lost what was admitted last


class SentBack(Enum):
    OK = "ok"
    ABSENT = "absent"  # no such letter
    OPEN = "open"  # its rollout is not booked yet
    NONE = "none"  # no dead rollout to send back
    ENDED = "ended"


class ChunkAnswer(Enum):
    OK = "ok"
    ENDED = "ended"
    LOST = "lost"
    FULL = "full"


class Counted(Enum):
    OK = "ok"
    LOST = "lost"


class Failed(Enum):
    AGAIN = "again"
    DEAD = "dead"


class Leased(Enum):
    OK = "ok"
    HELD = "held"  # by somebody else


class Published(Enum):
    OK = "ok"
    OLD = "old"


class ScoreAnswer(Enum):
    OK = "ok"
    DUPLICATE = "duplicate"
    ENDED = "ended"


class Judged(Enum):
    OK = "ok"
    DUPLICATE = "duplicate"
    ABSENT = "absent"  # the rollout was booked and taken off


class Done(Enum):
    """Of scripts that either do what they are for or are fenced."""

    OK = "ok"


class Ownership(Enum):
    """How a rollout stands to the worker that asks about it."""

    OURS = "ours"
    ENDED = "ended"  # it has a verdict
    LOST = "lost"  # somebody else writes it, or it is gone


# --- what goes in and comes out as one -------------------------------------------------------------------------


class Written(NamedTuple):
    """A rollout that a worker writes: its entry in `prompts` and the nonce of its taker."""

    rid: str
    entry: bytes
    nonce: str


class Ending(NamedTuple):
    """How a trajectory ends; `entry`: its own in `trajectories`."""

    entry: bytes
    rid: str
    ending: str
    reason: str = ""
    staleness: int | Literal[""] = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """`scored`: of an "ok" the chunks of the rollout that have been scored, as stored."""

    word: ChunkAnswer
    scored: bytes | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """`scored`: of a rollout that is ours the chunks of it that have been scored, as stored."""

    ownership: Ownership
    scored: bytes | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """`signals`: newer ones, entry and the rollout that each names ('' : none). `standings`: of those asked about."""

    signals: list[tuple[bytes, str]]
    policy: dict[str, str]
    standings: list[Standing]


@dataclass(frozen=True, slots=True)
class Offer:
    """A rollout that is to be written, as stored; `claims` is None where it is no number."""

    rid: bytes | None
    entry: bytes
    chunks: bytes | int | None
    length: bytes | int | None
    claims: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """What a worker was given, and where its next look at silent workers begins. `ended`: the run is over."""

    offers: list[Offer]
    claim_from: bytes = b""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Claimed:
    """`lost`: the group is. `notices`: entry, and takeovers of its rollout without progress."""

    notices: list[tuple[Entry, int]]
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """`attempts`: so far, of one that may be tried again."""

    word: Failed
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """`version`: of "old" the one that stands there."""

    word: Published
    version: int = -1


@dataclass(frozen=True, slots=True)
class Sight:
    """`names`: of the roster, where its revision is another one than the one that was known."""

    revision: bytes
    names: list[str]


# --- feeder ----------------------------------------------------------------------------------------------------


def admit(
    rid: str, head: bytes, cursor: int, threshold: str | bytes = b"", request: tuple[bytes, int] | None = None
) -> Fenced[Admitted]:
    """`cursor`: behind this rollout. `request`: its entry in `again` and its problem, of one that is sent back."""
    return Fenced("admit", (rid, head, cursor, threshold, *(request or ())), lambda reply: _word(Admitted, reply))


def book(rid: str, ledger_field: str, entries: Iterable[bytes]) -> Fenced[bool]:
    """Whether it was booked now, not before. `ledger_field` '' : only acknowledge."""
    return Fenced("book", (rid, ledger_field, *entries), lambda reply: bool(_second(reply) == 1))


def restore(cursor: int, generated: int, alive: Sequence[str | bytes], ledger: Mapping[str, int]) -> Fenced[Done]:
    """`generated`: tokens of booked rollouts."""
    return Fenced("restore", (cursor, generated, len(alive), *alive, *_flat(ledger.items())), _done)


def close(groups: Iterable[tuple[str, str]]) -> Fenced[Done]:
    """`groups`: stream and group of each."""
    return Fenced("close", _flat(groups), _done)


def sweep(silence_ms: int, groups: Iterable[tuple[str, str]]) -> Call[int]:
    """How many consumers were taken off. `groups`: stream and group of each."""
    return Call("sweep", (silence_ms, *_flat(groups)), lambda reply: int(_second(reply)))


def reopen(config: str) -> Call[Done]:
    return Call("reopen", (config,), _done)


# --- feeder, arbiter, learner ----------------------------------------------------------------------------------


def lease(role: str, token: str, ms: int, mode: Literal["take", "renew", "drop"]) -> Call[Leased]:
    return Call("lease", (role, token, ms, mode), lambda reply: _word(Leased, reply))


def adopt(stream: str, group: str, most: int) -> Fenced[list[Entry]]:
    def read(reply: list[Any]) -> list[Entry]:
        _done(reply)
        return [(entry, _pairs(fields)) for entry, fields in reply[1:]]

    return Fenced("adopt", (stream, group, most), read, names_role=True)


def advance(what: Literal["step", "covered", "learning", "state"], value: str | int) -> Fenced[Done]:
    return Fenced("advance", (what, value), _done, names_role=True)


# --- rollout worker --------------------------------------------------------------------------------------------


def take(consumer: str, nonce: str, count: int, idle_ms: int, claim_from: bytes) -> Call[Given]:
    """`idle_ms` 0: claim nothing."""

    def read(reply: list[Any]) -> Given:
        if reply[0] == b"ended":
            return Given([], ended=True)
        claim_from = _second(reply)
        return Given([Offer(*one) for one in reply[2:]], claim_from)

    return Call("take", (consumer, nonce, count, idle_ms, claim_from), read)


def chunk(
    rid: str, nonce: str, seq: int, tokens: bytes, support: bytes, shard: int, length: int, finish: str | None
) -> Call[Stored]:
    """`length`: tokens in all."""

    def read(reply: list[Any]) -> Stored:
        word = _word(ChunkAnswer, reply)
        return Stored(word, reply[1] if word is ChunkAnswer.OK else None)

    return Call("chunk", (rid, nonce, seq, tokens, support, shard, length, finish or ""), read)


def beat(consumer: str, last: bytes, done: Sequence[bytes], asked: Sequence[Written]) -> Call[Beat]:
    """`last`: the last signal that it has read; `done`: signals that it is done with."""

    def read(reply: list[Any]) -> Beat:
        _done(reply)
        _, signals, policy, *words = reply
        return Beat(
            [(entry, _text(_pairs(fields).get(b"rid", b""))) for entry, fields in signals],
            {_text(name): _text(value) for name, value in _pairs(policy).items()},
            [_standing(word) for word in words],
        )

    return Call("beat", (consumer, last, len(done), *done, *_flat(asked)), read)


def release(consumer: str, written: Iterable[Written]) -> Call[Done]:
    return Call("release", (consumer, *_flat(written)), _done)


def count(rid: str, nonce: str, generated: int) -> Call[Counted]:
    """`generated`: tokens in all."""
    return Call("count", (rid, nonce, generated), lambda reply: _word(Counted, reply))


def refused(version: int) -> Call[Done]:
    """`version`: of the weights that it could not take."""
    return Call("refused", (version,), _done)


# --- teacher worker --------------------------------------------------------------------------------------------


def claim(stream: str, consumer: str, idle_ms: int, most: int) -> Call[Claimed]:
    def read(reply: list[Any]) -> Claimed:
        if reply[0] == b"lost":
            return Claimed([], lost=True)
        _done(reply)
        return Claimed([((entry, _pairs(fields)), takeovers) for entry, fields, takeovers in reply[1:]])

    return Call("claim", (stream, consumer, idle_ms, most), read)


def score(shard: int, entry: bytes, rid: str, seq: int, divergence: bytes, support: bytes) -> Call[ScoreAnswer]:
    """`support`: the teacher's log-probabilities."""
    return Call("score", (shard, entry, rid, seq, divergence, support), lambda reply: _word(ScoreAnswer, reply))


# --- workers and others ----------------------------------------------------------------------------------------


def seen(name: str, role: str, silence_ms: int, revision: bytes, facts: Iterable[tuple[str, str | int]]) -> Call[Sight]:
    """`silence_ms`: after which one is off its role's roster (0: there is none). `revision`: the one that is known."""

    def read(reply: list[Any]) -> Sight:
        return Sight(_second(reply), [_text(one) for one in reply[2:]])

    return Call("seen", (name, role, silence_ms, revision, *_flat(facts)), read)


def gone(name: str, role: str, streams: Iterable[str]) -> Call[Done]:
    """`streams`: those that it read as one of the role's group."""
    return Call("gone", (name, role, *streams), _done)


def attempt(rid: str, role: str, what: Literal["begin", "over"]) -> Call[int]:
    """How many attempts have begun that nobody came back from."""
    return Call("attempt", (rid, role, what), lambda reply: int(_second(reply)))


def fail(
    rid: str,
    stage: str,
    reason: str,
    max_attempts: int,
    shown: bytes,
    stream: str,
    group: str,
    entry: bytes,
    report: str,
) -> Call[Failure]:
    """`rid` '' : unknown. `stream` '' : no entry. `report`: a token, so that one that arrives twice counts once."""

    def read(reply: list[Any]) -> Failure:
        word = _word(Failed, reply)
        return Failure(word, int(reply[1]) if word is Failed.AGAIN else 0)

    return Call("fail", (rid, stage, reason, max_attempts, shown, stream, group, entry, report), read)


# --- arbiter, learner, operator --------------------------------------------------------------------------------


def verdict(
    rid: str,
    verdict: bytes,
    train: int,
    stop: bool,
    minimum: float | None,
    buffer_size: int,
    threshold: float | None,
    entries: Iterable[bytes],
) -> Fenced[Judged]:
    """`verdict` b'' : none to give. `minimum` None: none for the buffer. `threshold` None: inactive from now on."""
    minimum_text, threshold_text = "" if minimum is None else repr(minimum), _threshold(threshold)
    args: tuple[Argument, ...] = (rid, verdict, train, int(stop), minimum_text, buffer_size, threshold_text, *entries)
    return Fenced("verdict", args, lambda reply: _word(Judged, reply))


def settle(endings: Iterable[Ending]) -> Fenced[int]:
    """How many of them had not been settled before."""
    return Fenced("settle", _flat(endings), lambda reply: int(_second(reply)))


def publish(version: int, step: int, file: str, sha256: str) -> Fenced[Publication]:
    def read(reply: list[Any]) -> Publication:
        word = _word(Published, reply)
        return Publication(word, int(reply[1]) if word is Published.OLD else version)

    return Fenced("publish", (version, step, file, sha256), read)


def again(entry: str | bytes, rid: str, problem: int | None) -> Call[SentBack]:
    """`entry`: in `dead`. `rid` '' : it names none. `problem` None: remove both for good."""
    return Call("again", (entry, rid, "" if problem is None else problem), lambda reply: _word(SentBack, reply))


# --- reading ---------------------------------------------------------------------------------------------------

W = TypeVar("W", bound=Enum)


def _word(words: type[W], reply: list[Any]) -> W:
    """The first element of a reply, one of the script's words. Raises UnexpectedReply."""
    text = _text(reply[0])
    try:
        return words(text)
    except ValueError as error:
        known = ", ".join(str(word.value) for word in words)
        raise UnexpectedReply(f"a script answered {text!r:.40}; {known} are known") from error


def _done(reply: list[Any]) -> Done:
    return _word(Done, reply)


def _second(reply: list[Any]) -> Any:
    """What comes with the word of a script that only has "ok"."""
    _done(reply)
    return reply[1]


def _standing(word: bytes | None) -> Standing:
    for ownership in (Ownership.ENDED, Ownership.LOST):
        if word == ownership.value.encode():
            return Standing(ownership)
    return Standing(Ownership.OURS, word)


def _threshold(threshold: float | None) -> str:
    return "inactive" if threshold is None else repr(threshold)


def _text(part: bytes) -> str:
    return part.decode("ascii", "replace")


def _pairs(flat: Sequence[bytes] | None) -> dict[bytes, bytes]:
    """A hash or an entry's fields, as Lua hands them on; nothing where there is nil."""
    flat = flat or ()
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _flat(rows: Iterable[Iterable[Any]]) -> tuple[Argument, ...]:
    return tuple(part for row in rows for part in row)
