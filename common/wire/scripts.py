"""The scripts of `lua/`, one function each, with the same name: typed arguments in, a call that reads its reply out.

Arguments have the order of the script's header, except for the lease: scripts that only a role's holder may run are
`Fenced`, and the lease adds its own arguments. A trip is a list of calls, and returns a list of typed replies
(`Plane.call`, `Plane.call_all`, `Lease.call`, `Lease.call_all`). Stored data may be broken: fields of a record
are passed on unchecked, and the code that uses them checks them.

With several data servers each call goes to one of them, `Call.at`: that of a rollout, that of an entry (see
`entries.py`), or by its place in `redis.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgpack
import redis

from common.wire.entries import bare, tagged

NAMES = (
    *("admit", "take", "beat", "release", "chunk", "count", "claim", "attempt", "score", "look", "verdict"),
    *("settle", "book", "restore", "fail", "again", "reopen", "publish", "advance", "lease", "adopt", "close"),
    *("seen", "gone", "sweep", "refused", "calibrate", "reward", "unreward", "forgo", "exclusive"),
)
Entry = tuple[bytes, dict[bytes, bytes]]
Argument = str | int | bytes
R = TypeVar("R")


class UnexpectedReply(RuntimeError):
    """A script returned a word that its header does not name."""


# --- calls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """A script to run, and how to read its reply. `at`: the rollout (text), the entry (bytes) or the place of the
    server that it is for; the home for a rollout without a name."""

    script: str
    args: tuple[Argument, ...]
    read: Callable[[list[Any]], R]
    at: str | bytes | int = 0


@dataclass(frozen=True, slots=True)
class Fenced(Generic[R]):
    """A script that only the holder of a role's lease may run; `names_role`: it may be one of several roles."""

    script: str
    args: tuple[Argument, ...]
    read: Callable[[list[Any]], R]
    names_role: bool = False
    at: str | bytes | int = 0

    def by(self, role: str, token: str) -> Call[R | None]:
        """The holder's call; its reply is None if the lease has been lost, or if there is no `read`."""
        fence = (role, token) if self.names_role else (token,)
        read = self.read
        return Call(
            self.script, (*fence, *self.args), lambda reply: None if reply[0] == b"lost" else read(reply), self.at
        )


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
class Look:
    """What the arbiter reads of a rollout, as stored. `head`: True if chunks of it were read before; None: there is no
    record. `scored`: tokens and divergence of each newly read chunk, in turn, each followed by its view where views are
    read, b"" if it has none."""

    head: bytes | Literal[True] | None
    judged: bool
    threshold: bytes | None
    finish: bytes | None
    chunks: bytes | None
    length: bytes | None
    scored: list[bytes]


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
    """`cursor`: of the rollout's server, after this rollout. `request`: its entry in `again`, on that server, and its
    problem, if it was sent back."""
    asked: tuple[Argument, ...] = (bare(request[0]), request[1]) if request else ()
    return Fenced("admit", (rid, head, cursor, threshold, *asked), lambda reply: _word(Admitted, reply), at=rid)


def book(rid: str, ledger_field: str, entries: Iterable[bytes]) -> Fenced[bool]:
    """Returns whether it was booked now, not before. `ledger_field` '' : only acknowledge."""
    own: tuple[Argument, ...] = (rid, ledger_field, *map(bare, entries))
    return Fenced("book", own, lambda reply: bool(_second(reply) == 1), at=rid)


def reward(rid: str, standing: str) -> Fenced[str]:
    """Returns the standing in its group (see `common.groups`) that is stored, this one or a former one."""
    return Fenced("reward", (rid, standing), lambda reply: _text(_second(reply)), at=rid)


def unreward(rids: Sequence[str]) -> Fenced[Done]:
    """`rids`: of one server."""
    return Fenced("unreward", tuple(rids), _done, at=rids[0] if rids else 0)


def restore(
    cursor: int, generated: int, alive: Sequence[str | bytes], ledger: Mapping[str, int], place: int = 0
) -> Fenced[Done]:
    """`generated`: tokens of booked rollouts. All four are of one server."""
    return Fenced("restore", (cursor, generated, len(alive), *alive, *_flat(ledger.items())), _done, at=place)


def close(groups: Iterable[tuple[str, str]], place: int = 0) -> Fenced[Done]:
    """`groups`: stream and group of each."""
    return Fenced("close", _flat(groups), _done, at=place)


def sweep(silence_ms: int, groups: Iterable[tuple[str, str]]) -> Call[int]:
    """Returns the number of consumers removed. `groups`: stream and group of each."""
    return Call("sweep", (silence_ms, *_flat(groups)), lambda reply: int(_second(reply)))


def reopen(config: str) -> Call[Done]:
    return Call("reopen", (config,), _done)


def exclusive(what: str, token: str, ms: int, mode: Literal["take", "drop"]) -> Call[Leased]:
    return Call("exclusive", (what, token, ms, mode), lambda reply: _word(Leased, reply))


# --- feeder, arbiter, learner ----------------------------------------------------------------------------------


def lease(role: str, token: str, ms: int, mode: Literal["take", "renew", "drop"], place: int = 0) -> Call[Leased]:
    return Call("lease", (role, token, ms, mode), lambda reply: _word(Leased, reply), at=place)


def adopt(stream: str, group: str, most: int, place: int = 0) -> Fenced[list[Entry]]:
    def read(reply: list[Any]) -> list[Entry]:
        _done(reply)
        return [(tagged(entry, place), _pairs(fields)) for entry, fields in reply[1:]]

    return Fenced("adopt", (stream, group, most), read, names_role=True, at=place)


def advance(what: Literal["step", "covered", "learning", "state"], value: str | int, place: int = 0) -> Fenced[Done]:
    return Fenced("advance", (what, value), _done, names_role=True, at=place)


# --- rollout worker --------------------------------------------------------------------------------------------


def take(consumer: str, nonce: str, count: int, idle_ms: int, claim_from: bytes, place: int = 0) -> Call[Given]:
    """`idle_ms` 0: claim nothing. `claim_from`: as this server named it."""

    def read(reply: list[Any]) -> Given:
        if reply[0] == b"ended":
            return Given([], ended=True)
        claim_from = _second(reply)
        offers = [Offer(rid, tagged(entry, place), *counts) for rid, entry, *counts in reply[2:]]
        return Given(offers, claim_from)

    return Call("take", (consumer, nonce, count, idle_ms, claim_from), read, at=place)


def chunk(
    rid: str,
    nonce: str,
    seq: int,
    tokens: bytes,
    support: bytes,
    logprobs: bytes,
    lane: str,
    length: int,
    finish: str | None,
) -> Call[Stored]:
    """`lane`: of the stream of chunks, see `Plane.lane_of`. `length`: total tokens."""

    def read(reply: list[Any]) -> Stored:
        word = _word(ChunkAnswer, reply)
        return Stored(word, reply[1] if word is ChunkAnswer.OK else None)

    return Call("chunk", (rid, nonce, seq, tokens, support, logprobs, lane, length, finish or ""), read, at=rid)


def beat(consumer: str, last: bytes, done: Sequence[bytes], asked: Sequence[Written], place: int = 0) -> Call[Beat]:
    """`last`: the last signal that it has read; `done`: signals that it has processed. All are of one server."""

    def read(reply: list[Any]) -> Beat:
        _done(reply)
        _, signals, policy, *words = reply
        return Beat(
            [(entry, _text(_pairs(fields).get(b"rid", b""))) for entry, fields in signals],
            {_text(name): _text(value) for name, value in _pairs(policy).items()},
            [_standing(word) for word in words],
        )

    return Call("beat", (consumer, last, len(done), *done, *_plain(asked)), read, at=place)


def release(consumer: str, written: Sequence[Written]) -> Call[Done]:
    """`written`: rollouts of one server."""
    return Call("release", (consumer, *_plain(written)), _done, at=written[0].rid if written else 0)


def _plain(written: Sequence[Written]) -> tuple[Argument, ...]:
    return _flat((rid, bare(entry), nonce) for rid, entry, nonce in written)


def count(rid: str, nonce: str, generated: int) -> Call[Counted]:
    """`generated`: total tokens."""
    return Call("count", (rid, nonce, generated), lambda reply: _word(Counted, reply), at=rid)


def refused(version: int) -> Call[Done]:
    """`version`: of the weights that it could not load."""
    return Call("refused", (version,), _done)


# --- teacher worker --------------------------------------------------------------------------------------------


def claim(stream: str, consumer: str, idle_ms: int, most: int) -> Call[Claimed]:
    """Of the server that is asked; see `Plane.claim_chunks`."""

    def read(reply: list[Any]) -> Claimed:
        if reply[0] == b"lost":
            return Claimed([], lost=True)
        _done(reply)
        return Claimed([((entry, _pairs(fields)), takeovers) for entry, fields, takeovers in reply[1:]])

    return Call("claim", (stream, consumer, idle_ms, most), read)


def score(
    lane: str, entry: bytes, rid: str, seq: int, divergence: bytes, support: bytes, view: bytes = b""
) -> Call[ScoreAnswer]:
    """`lane`: of the stream of chunks that the entry is in. `support`: the teacher's log-probabilities. `view` b'' :
    none is stored."""
    own = (lane, bare(entry), rid, seq, divergence, support, view)
    return Call("score", own, lambda reply: _word(ScoreAnswer, reply), at=rid)


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
    return Call("attempt", (rid, role, what), lambda reply: int(_second(reply)), at=rid)


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

    own = (rid, stage, reason, max_attempts, shown, stream, group, bare(entry), report)
    return Call("fail", own, read, at=rid or entry)


# --- arbiter, learner, operator --------------------------------------------------------------------------------


def look(most: int, asked: Sequence[tuple[str, int]], *, views: bool = False) -> Call[list[Look]]:
    """`most`: chunks to read of each. `asked`: rollouts of one server, each with the first chunk to read. `views`:
    whether the views of the chunks are read too."""

    def read(reply: list[Any]) -> list[Look]:
        rows = msgpack.unpackb(_second(reply), raw=True)
        return [_look_of(row) for row in rows]

    return Call("look", (most, int(views), *_flat(asked)), read, at=asked[0][0] if asked else 0)


def verdict(
    rid: str,
    verdict: bytes,
    train: int,
    stop: bool,
    minimum: float | None,
    buffer_size: int,
    threshold: float | Literal[""] | None,
    entries: Iterable[bytes],
    teacher: str = "",
) -> Fenced[Judged]:
    """`verdict` b'' : none. `minimum` None: none for the buffer. `threshold` None: inactive from now on; '' : as is.
    `teacher`: whose buffer and threshold these are."""
    minimum_text = "" if minimum is None else repr(minimum)
    threshold_text = "" if threshold == "" else _threshold(threshold)
    args: tuple[Argument, ...] = (rid, verdict, train, int(stop), minimum_text, buffer_size, threshold_text, teacher)
    return Fenced("verdict", (*args, *map(bare, entries)), lambda reply: _word(Judged, reply), at=rid)


def calibrate(
    number: int, buffer_size: int, threshold: float | None, minima: Sequence[float], place: int, teacher: str = ""
) -> Fenced[Done]:
    """With several servers, after verdicts. `number`: of this call, rising; `threshold` and `teacher` as for `verdict`;
    `minima`: for the buffer, at the home."""
    args: tuple[Argument, ...] = (number, buffer_size, _threshold(threshold), teacher, *map(repr, minima))
    return Fenced("calibrate", args, _done, at=place)


def settle(endings: Sequence[Ending]) -> Fenced[int]:
    """Returns how many of them had not been settled before. `endings`: of rollouts of one server."""
    rows = _flat(one._replace(entry=bare(one.entry)) for one in endings)
    return Fenced("settle", rows, lambda reply: int(_second(reply)), at=endings[0].rid if endings else 0)


def forgo(first: str, reason: str) -> Fenced[str]:
    """`first`: the first rollout of the group. Returns the reason that is stored, this one or a former one."""
    return Fenced("forgo", (first, reason), lambda reply: _text(_second(reply)), at=first)


def publish(version: int, step: int, file: str, sha256: str) -> Fenced[Publication]:
    def read(reply: list[Any]) -> Publication:
        word = _word(Published, reply)
        return Publication(word, int(reply[1]) if word is Published.OLD else version)

    return Fenced("publish", (version, step, file, sha256), read)


def again(entry: str | bytes, rid: str, problem: int | None) -> Call[SentBack]:
    """`entry`: in `dead`. `rid` '' : it names none. `problem` None: delete both."""
    entry = entry.encode() if isinstance(entry, str) else entry
    return Call(
        "again", (bare(entry), rid, "" if problem is None else problem), lambda reply: _word(SentBack, reply), at=entry
    )


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


def _look_of(row: list[Any]) -> Look:
    """Lua has false where Redis has nothing."""
    head, judged, *others = row[:6]
    threshold, finish, chunks, length = (None if value is False else value for value in others)
    return Look(None if head is False else head, judged, threshold, finish, chunks, length, row[6:])


def _text(part: bytes) -> str:
    return part.decode("ascii", "replace")


def _pairs(flat: Sequence[bytes] | None) -> dict[bytes, bytes]:
    """A hash or an entry's fields, as Lua returns them; empty for nil."""
    flat = flat or ()
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _flat(rows: Iterable[Iterable[Any]]) -> tuple[Argument, ...]:
    return tuple(part for row in rows for part in row)
