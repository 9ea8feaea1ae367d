"""The scripts of `lua/`, one function each, with the same name: typed arguments in, a call that reads its reply out.

Arguments have the order of the script's header, except for the lease: scripts that only a role's holder may run are
`Fenced`, and the lease adds its own arguments. A trip is a list of calls, and returns a list of typed replies
(`Plane.call`, `Plane.call_all`, `Lease.call`, `Lease.call_all`). Stored data may be broken: fields of a record
are passed on unchecked, and the code that uses them checks them.
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
    """A script returned a word that its header does not name."""


# --- calls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """A script to run, and how to read its reply."""

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
        """The holder's call; its reply is None if the lease has been lost, or if there is no `read`."""
        fence = (role, token) if self.names_role else (token,)
        return Call(self.script, (*fence, *self.args), lambda reply: None if reply[0] == b"lost" else self.read(reply))


def answered(answer: Any) -> list[Any]:
    """A script's reply; ["full"] if it was refused for lack of memory; other errors are raised."""
    if isinstance(answer, redis.exceptions.ResponseError) and "OOM" in str(answer):
        return [b"full"]
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


def run_is_gone(reply: list[Any]) -> bool:
    """Any script may return this: Redis no longer has the run."""
    return bool(reply[0] == b"gone")


# --- status words in replies -----------------------------------------------------------------------------------


class Admitted(Enum):
    OK = "ok"
    FULL = "full"
    ENDED = "ended"
    TAKEN = "taken"  # the request no longer exists
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
    HELD = "held"  # by another process


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
    ABSENT = "absent"  # the rollout was booked and removed


class Done(Enum):
    """For scripts that either succeed or are fenced off."""

    OK = "ok"


class Ownership(Enum):
    """State of a rollout, for the worker that asks about it."""

    OURS = "ours"
    ENDED = "ended"  # it has a verdict
    LOST = "lost"  # another worker writes it, or it is gone


# --- arguments and replies of several values -------------------------------------------------------------------


class Written(NamedTuple):
    """A rollout that a worker writes: its entry in `prompts` and the owner's nonce."""

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
    """`scored`: with "ok", the number of scored chunks of the rollout, as stored."""

    word: ChunkAnswer
    scored: bytes | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """`scored`: for a rollout of ours, the number of its scored chunks, as stored."""

    ownership: Ownership
    scored: bytes | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """`signals`: newer ones, entry and rollout ('' : none) of each. `standings`: of the rollouts asked about."""

    signals: list[tuple[bytes, str]]
    policy: dict[str, str]
    standings: list[Standing]


@dataclass(frozen=True, slots=True)
class Offer:
    """A rollout to write, as stored; `claims` is None if it is not a number."""

    rid: bytes | None
    entry: bytes
    chunks: bytes | int | None
    length: bytes | int | None
    claims: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """The rollouts a worker got, and where its next claim from silent workers begins. `ended`: the run is over."""

    offers: list[Offer]
    claim_from: bytes = b""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Claimed:
    """`lost`: the group is lost. `notices`: entry, and takeovers of its rollout without progress."""

    notices: list[tuple[Entry, int]]
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """`attempts`: so far, of a rollout that may be tried again."""

    word: Failed
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """`version`: with "old", the one that is stored."""

    word: Published
    version: int = -1


@dataclass(frozen=True, slots=True)
class Sight:
    """`names`: of the roster, if its revision differs from the known one."""

    revision: bytes
    names: list[str]


# --- feeder ----------------------------------------------------------------------------------------------------


def admit(
    rid: str, head: bytes, cursor: int, threshold: str | bytes = b"", request: tuple[bytes, int] | None = None
) -> Fenced[Admitted]:
    """`cursor`: after this rollout. `request`: its entry in `again` and its problem, if it was sent back."""
    return Fenced("admit", (rid, head, cursor, threshold, *(request or ())), lambda reply: _word(Admitted, reply))


def book(rid: str, ledger_field: str, entries: Iterable[bytes]) -> Fenced[bool]:
    """Returns whether it was booked now, not before. `ledger_field` '' : only acknowledge."""
    return Fenced("book", (rid, ledger_field, *entries), lambda reply: bool(_second(reply) == 1))


def restore(cursor: int, generated: int, alive: Sequence[str | bytes], ledger: Mapping[str, int]) -> Fenced[Done]:
    """`generated`: tokens of booked rollouts."""
    return Fenced("restore", (cursor, generated, len(alive), *alive, *_flat(ledger.items())), _done)


def close(groups: Iterable[tuple[str, str]]) -> Fenced[Done]:
    """`groups`: stream and group of each."""
    return Fenced("close", _flat(groups), _done)


def sweep(silence_ms: int, groups: Iterable[tuple[str, str]]) -> Call[int]:
    """Returns the number of consumers removed. `groups`: stream and group of each."""
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
    """`length`: total tokens."""

    def read(reply: list[Any]) -> Stored:
        word = _word(ChunkAnswer, reply)
        return Stored(word, reply[1] if word is ChunkAnswer.OK else None)

    return Call("chunk", (rid, nonce, seq, tokens, support, shard, length, finish or ""), read)


def beat(consumer: str, last: bytes, done: Sequence[bytes], asked: Sequence[Written]) -> Call[Beat]:
    """`last`: the last signal that it has read; `done`: signals that it has processed."""

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
    """`generated`: total tokens."""
    return Call("count", (rid, nonce, generated), lambda reply: _word(Counted, reply))


def refused(version: int) -> Call[Done]:
    """`version`: of the weights that it could not load."""
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
    """`silence_ms`: a silent worker is removed from its role's roster after this (0: no roster). `revision`: the known
    one."""

    def read(reply: list[Any]) -> Sight:
        return Sight(_second(reply), [_text(one) for one in reply[2:]])

    return Call("seen", (name, role, silence_ms, revision, *_flat(facts)), read)


def gone(name: str, role: str, streams: Iterable[str]) -> Call[Done]:
    """`streams`: those that it read in the role's group."""
    return Call("gone", (name, role, *streams), _done)


def attempt(rid: str, role: str, what: Literal["begin", "over"]) -> Call[int]:
    """Returns the number of attempts that started and did not end."""
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
    """`rid` '' : unknown. `stream` '' : no entry. `report`: a token, so that a repeated report counts once."""

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
    """`verdict` b'' : none. `minimum` None: none for the buffer. `threshold` None: inactive from now on."""
    minimum_text, threshold_text = "" if minimum is None else repr(minimum), _threshold(threshold)
    args: tuple[Argument, ...] = (rid, verdict, train, int(stop), minimum_text, buffer_size, threshold_text, *entries)
    return Fenced("verdict", args, lambda reply: _word(Judged, reply))


def settle(endings: Iterable[Ending]) -> Fenced[int]:
    """Returns how many of them had not been settled before."""
    return Fenced("settle", _flat(endings), lambda reply: int(_second(reply)))


def publish(version: int, step: int, file: str, sha256: str) -> Fenced[Publication]:
    def read(reply: list[Any]) -> Publication:
        word = _word(Published, reply)
        return Publication(word, int(reply[1]) if word is Published.OLD else version)

    return Fenced("publish", (version, step, file, sha256), read)


def again(entry: str | bytes, rid: str, problem: int | None) -> Call[SentBack]:
    """`entry`: in `dead`. `rid` '' : it names none. `problem` None: delete both."""
    return Call("again", (entry, rid, "" if problem is None else problem), lambda reply: _word(SentBack, reply))


# --- reading ---------------------------------------------------------------------------------------------------

W = TypeVar("W", bound=Enum)


def _word(words: type[W], reply: list[Any]) -> W:
    """The first element of a reply, one of the script's status words. Raises UnexpectedReply."""
    text = _text(reply[0])
    try:
        return words(text)
    except ValueError as error:
        known = ", ".join(str(word.value) for word in words)
        raise UnexpectedReply(f"a script returned {text!r:.40}; expected one of: {known}") from error


def _done(reply: list[Any]) -> Done:
    return _word(Done, reply)


def _second(reply: list[Any]) -> Any:
    """The values after the word of a script that only has "ok"."""
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
    """A hash or an entry's fields, as Lua returns them; empty for nil."""
    flat = flat or ()
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _flat(rows: Iterable[Iterable[Any]]) -> tuple[Argument, ...]:
    return tuple(part for row in rows for part in row)
