"""Redis: the data plane. All keys are listed here, and every change of state is one script in `lua/`.

Keys, under `katana:{name-id}:` (the braces are literal: in a Redis cluster one run lives in one slot)

    run              string   open → trained (by the learner) → ended (by the feeder); missing: Redis lost the run
    config           string   resolved config, YAML
    rollout:{rid}    hash     the record of a rollout, whole:
                       head · entry (its id in `prompts`) · owner (nonce) · owners (every owner and its first chunk) ·
                       worker · chunks · length · scored · finish · settled (the learner is done with it)
                       t:{seq} ChunkTokens · p:{seq} ChunkSupport · s:{seq} ChunkLogprobs (until it is scored) ·
                       d:{seq} ScoreDivergence · q:{seq} ScoreSupport · v:{seq} ScoreView (where it is read) ·
                       threshold · verdict · counted (its writer's count) · attempts · report (the last one counted) ·
                       claims (by other writers) · taken (chunks, by other teachers) · begun:{role} (attempts without
                       an end) · problem (of one that was sent back)
    prompts          stream   feeder → rollout workers     group rollout   rid
    chunks:{shard}   stream   rollout → teacher workers    group teacher   rid seq;  of several teachers each has its
                                own: chunks:{teacher}:{shard}
    scores           stream   teacher workers → arbiter    group arbiter   rid ("look at this rollout")
    signals:{worker} stream   arbiter → a rollout worker   no group        rid
    trajectories     stream   arbiter → learner            group learner   rid
    finished         stream   workers, arbiter, learner → feeder, group books: verdict | count | ending
    dead             stream   anyone → operator            no group        rid stage reason shown
    again            stream   operator → feeder            no group        rid problem (to be admitted again)
    open             set      rollouts admitted and not booked
    ledger           hash     admitted · trained · dead · dropped:{reason}
    cursor           string   rollouts admitted so far
    rewards          hash     rollout → its standing in its group, group:{its first rollout} → why it has no rewards; of
                              groups with members that are not booked (`common.groups`)
    policy           hash     version · step · covered (step of the checkpoint) · file · sha256 ·
                       learning (1: a learner is at work, or was killed) ·
                       generated (tokens written in the whole run) · refused (version that a worker could not load)
    minima           list     the FIFO of window minima;  threshold: string, in force for new rollouts;  of several
                                teachers each has its own: minima:{teacher}, threshold:{teacher}
    workers          zset     worker id → last seen (Redis's clock);  worker:{id}: hash, facts about it
    roster:{role}    zset     as workers, only live ones of a role;  changes:{role}: string, its revision;  of several
                                teachers each has its own: roster:teacher:{teacher}
    lease:{role}     string   token of the holder, which is also its consumer name;  holder:{role}: last holder
    exclusive:{what} hash     token · until (Redis's clock, ms): the rollout worker that swaps a vLLM server's weights,
                              or that has a number (number-{n}), by which workers share out several servers
    place            string   of several data servers, which one this is ("1/3")
    calibrated       string   of several data servers, the last call of that name (of several teachers each its own)

With several data servers (`planes.py`) each has all of these for its own rollouts, but `policy` and `minima` are the
home's; the others' `policy` has `generated` alone. `katana:runs` (hash) has the current id of every run. Pending
entries of a group are being worked on; acknowledged ones are deleted; streams are never trimmed by length.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from typing import Any, TypeVar

import redis

from common import metrics, teachers, tracing
from common.config import Config
from common.footprint import RECORDS_AT_A_TIME
from common.tracing import SpanKind
from common.wire import scripts
from common.wire.scripts import Call, Entry, Failed, SentBack

log = logging.getLogger("katana.streams")
RUNS = "katana:runs"
_LONGEST_BLOCK_S = 2.0
GROUPS = {"prompts": "rollout", "scores": "arbiter", "trajectories": "learner", "finished": "books"}
# A full Redis refuses plain writes until something is deleted; scripts report it themselves (`full`).
_MAY_PASS = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.OutOfMemoryError,
    OSError,
)
_DISK_FULL = "MISCONF"  # a server refuses writes with this while it cannot write its append-only file
T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class RedisUnavailable(ConnectionError):
    """Redis did not answer for as long as the config allows."""


class RunGone(RuntimeError):
    """Redis answers, but no longer has this run."""


class Stopping(Exception):
    """The process was asked to stop while it waited for Redis."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """`memory`: from INFO. `streams`: by name, the entries outstanding and the age of the oldest pending one."""

    memory: dict[str, Any] | None
    dead: int | None
    streams: dict[str, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class RecordState:
    """A rollout: whether it is open, whether its record exists; attempts and claims as stored (b"": none)."""

    open: bool
    there: bool
    attempts: bytes
    claims: bytes


@dataclass(frozen=True, slots=True)
class Rewarded:
    """A rollout: whether its record is there, its standing in its group, and, of a group's first rollout, why the group
    has no rewards; None: not stored."""

    there: bool
    standing: str | None
    forgone: str | None


@dataclass(slots=True)
class Roster:
    """The live workers of a role, as last read from Redis. `silence_s`: a worker silent for so long is removed."""

    silence_s: float
    names: list[str] = field(default_factory=list)
    revision: bytes = b"-1"


def _source(name: str) -> str:
    folder = files("common.wire") / "lua"
    return (folder / "prelude.lua").read_text() + (folder / f"{name}.lua").read_text()


def _reader(client: Any) -> Any:
    """A client of the same server for blocking reads: its socket timeout must be longer than the block."""
    pool = client.connection_pool
    settings = pool.connection_kwargs | {"socket_timeout": pool.connection_kwargs["socket_timeout"] + _LONGEST_BLOCK_S}
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **settings))


class Plane:
    """One run's streams on one data Redis. Blocking reads have a connection of their own.

    Scripts are fenced (by owner, sequence, lease or entry), so a script whose reply was lost is run again. So are reads
    by a group (their pending entries are read again, or claimed when idle) and idempotent writes.
    After a failed or slow call `may_claim` is False for a while.
    """

    def __init__(
        self,
        client: redis.Redis,
        run_key: str,
        *,
        shards: int,
        wait_s: float,
        claim_pause_s: float,
        stop: threading.Event | None = None,
        server: str = "Redis",
        teachers: Sequence[str] = ("",),
    ) -> None:
        """`server`: its name in messages. `teachers`: names, as `Config.all_teachers`."""
        self.client: Any = client  # redis-py types every reply as one of several types, str and bytes alike
        self._reader = _reader(client)
        self.prefix = f"katana:{{{run_key}}}:"
        self.run_key = run_key
        self.shards, self.teachers = shards, tuple(teachers)
        self.errors: Callable[[str], None] = lambda kind: None
        self._wait_s, self._claim_pause_s, self._server = wait_s, claim_pause_s, server
        self._stop = stop or threading.Event()
        self._stalled_until = 0.0
        self.failed_calls = 0
        self._last_read: dict[tuple[str, str], bytes] = {}  # (stream, consumer) -> id
        self._unsure: set[tuple[str, str]] = set()  # reads whose reply was lost
        self._scripts = {name: client.register_script(_source(name)) for name in scripts.NAMES}

    def key(self, name: str) -> str:
        return self.prefix + name

    # --- the data servers ----------------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Plane]:
        """The plane of each data server, the home first: of a single one this plane itself."""
        return (self,)

    @property
    def places(self) -> range:
        """The servers' places in `parts`."""
        return range(len(self.parts))

    def place_of(self, rid: str) -> int:
        """The place of the server that has a rollout."""
        return 0

    def by_server(self, items: Iterable[T], rid_of: Callable[[T], str]) -> list[list[T]]:
        """Items that belong to rollouts, those of one server together; no empty list."""
        found = list(items)
        return [found] if found else []

    # --- calls that wait for a Redis that does not answer ------------------------------------------------------

    def call(self, call: Call[R]) -> R:
        """Run a script until Redis has answered. Raises RunGone, RedisUnavailable, Stopping."""
        return self.call_all([call])[0]

    def call_all(self, calls: Sequence[Call[R]]) -> list[R]:
        """Run scripts in one round trip; replies in the same order.

        Each call is atomic by itself. All are sent again if the reply was lost: scripts are fenced.
        """

        def once() -> list[list[Any]]:
            answers = self._evaluate(calls)
            if any("NOGROUP" in str(answer) for answer in answers if isinstance(answer, Exception)):
                self._recreate_groups()
                answers = self._evaluate(calls)
            return [scripts.answered(answer) for answer in answers]

        replies = self.patiently(once, " ".join(dict.fromkeys(call.script for call in calls))) if calls else []
        if any(map(scripts.run_is_gone, replies)):
            raise self._gone()
        return [call.read(reply) for call, reply in zip(calls, replies, strict=True)]

    def trip(
        self, a: Sequence[Call[A]], b: Sequence[Call[B]], c: Sequence[Call[C]], d: Sequence[Call[D]]
    ) -> tuple[list[A], list[B], list[C], list[D]]:
        """Calls of several kinds in one round trip, in this order; returns the replies by kind."""
        calls: list[Call[Any]] = [*a, *b, *c, *d]
        replies = iter(self.call_all(calls))
        first, second, third, fourth = (list(islice(replies, len(kind))) for kind in (a, b, c, d))
        return first, second, third, fourth

    def _evaluate(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Replies, including exceptions. Only calls whose script was missing are run again: the others have run."""
        answers: list[Any] = [None] * len(calls)
        left = list(range(len(calls)))
        for _ in range(2):
            pipe = self.client.pipeline(transaction=False)
            for place in left:
                call = calls[place]
                pipe.evalsha(self._scripts[call.script].sha, 1, self.key("run"), self.prefix, *call.args)
            for place, answer in zip(left, pipe.execute(raise_on_error=False), strict=True):
                answers[place] = answer
            left = [place for place in left if isinstance(answers[place], redis.exceptions.NoScriptError)]
            if not left:
                break
            for script in {calls[place].script for place in left}:
                self.client.script_load(self._scripts[script].script)  # a restarted Redis has none
        return answers

    def patiently(self, action: Callable[[], T], what: str, kind: SpanKind = "redis") -> T:
        """Repeat an action that is safe to repeat until it succeeds; log while it does not."""
        began = time.monotonic()
        pause = 0.05
        while True:
            sent = time.monotonic()
            try:
                with tracing.span(what, kind):
                    result = action()
            except (*_MAY_PASS, redis.exceptions.ResponseError) as error:
                if not isinstance(error, _MAY_PASS) and _DISK_FULL not in str(error):
                    raise
                self.errors(type(error).__name__)
                self.failed_calls += 1
                self._stalled_until = time.monotonic() + self._claim_pause_s
                waited = time.monotonic() - began
                if waited > self._wait_s:
                    raise RedisUnavailable(
                        f"{self._server} has not answered {what!r} for {waited:.0f} s ({error}); "
                        f"liveness.redis_wait_s is {self._wait_s:g}"
                    ) from error
                log.warning("%s did not answer %r (%s); trying again in %.2f s", self._server, what, error, pause)
                if self._stop.wait(pause):
                    raise Stopping from error
                pause = min(pause * 2, 1.0)
                continue
            now = time.monotonic()
            if now - sent > self._claim_pause_s / 2 + 2.0:
                self._stalled_until = now + self._claim_pause_s
            return result

    @property
    def may_claim(self) -> bool:
        """False after a failed or slow call: a stall makes all entries look idle."""
        return time.monotonic() >= self._stalled_until

    # --- the run -----------------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Every stream that is read by a group, and the group."""
        return [
            *GROUPS.items(),
            *((stream, "teacher") for name in self.teachers for stream in self.chunk_streams(name)),
        ]

    def create_groups(self) -> None:
        """Groups from 0, so that a group that was lost and is made again sees all entries still in the stream."""
        pairs = self.groups
        pipe = self.client.pipeline(transaction=False)
        for stream, group in pairs:
            pipe.xgroup_create(self.key(stream), group, id="0", mkstream=True)
        for (stream, _), answer in zip(pairs, pipe.execute(raise_on_error=False), strict=True):
            if not isinstance(answer, Exception):
                self._last_read = {place: entry for place, entry in self._last_read.items() if place[0] != stream}
            elif "BUSYGROUP" not in str(answer) and not isinstance(answer, redis.exceptions.NoPermissionError):
                raise answer  # a role's ACL allows only its own groups: other roles make the others

    def _recreate_groups(self) -> None:
        """For a run whose groups were lost; a run that is lost altogether is not created again. Raises RunGone."""
        if not self.client.exists(self.key("run")):
            raise self._gone()
        self.create_groups()

    def _gone(self) -> RunGone:
        return RunGone(f"{self._server} does not know the run {self.run_key!r} any more: its data was lost or cleaned")

    def place(self) -> str | None:
        """Which of how many data servers this is in its run, from 0: "1/3"; None if it does not have the run."""

        def once() -> Any:
            pipe = self.client.pipeline(transaction=False)
            pipe.get(self.key("run"))
            pipe.get(self.key("place"))
            return pipe.execute()

        run, place = self.patiently(once, "place")
        return (place or b"0/1").decode("ascii", "replace") if run is not None else None

    def config(self) -> bytes | None:
        """The run's config as stored, YAML; None if Redis does not have the run."""
        value = self.patiently(lambda: self.client.get(self.key("config")), "config")
        return value if isinstance(value, bytes) else None

    def state(self) -> str | None:
        value = self.patiently(lambda: self.client.get(self.key("run")), "state")
        return value.decode() if isinstance(value, bytes) else None

    def shard_of(self, rid: str) -> int:
        return zlib.crc32(rid.encode()) % self.shards

    def lane_of(self, rid: str, teacher: str = "") -> str:
        """Where the chunks of a rollout of a teacher go: the stream `chunks:{lane}`."""
        return teachers.lane(teacher, self.shard_of(rid))

    def chunk_streams(self, teacher: str = "", shards: Iterable[int] | None = None) -> list[str]:
        """The streams of chunks that a teacher's workers read; `shards`: only these of them."""
        return [
            f"chunks:{teachers.lane(teacher, shard)}" for shard in (range(self.shards) if shards is None else shards)
        ]

    def read(
        self, group: str, consumer: str, streams: Sequence[str], *, count: int, block_s: float
    ) -> list[tuple[str, Entry]]:
        """New entries as (stream, (id, fields)); `block_s` at most 2.

        A read that Redis executed and whose reply was lost has made its entries pending. They are after the last
        entry that this consumer has seen, and are returned first.
        """

        def once() -> Any:
            block = max(1, int(min(block_s, _LONGEST_BLOCK_S) * 1000)) if block_s > 0 else None
            unsure = [stream for stream in streams if (stream, consumer) in self._unsure]
            self._unsure.update((stream, consumer) for stream in streams)
            names = {self.key(stream): self._last_read.get((stream, consumer), b"0") for stream in unsure}
            reader = self._reader
            answer: Any = names and self._or_groups(lambda: reader.xreadgroup(group, consumer, names, count=count))
            if not any(entries for _, entries in answer or ()):
                fresh = {self.key(stream): ">" for stream in streams}
                answer = self._or_groups(lambda: reader.xreadgroup(group, consumer, fresh, count=count, block=block))
                self._unsure.difference_update((stream, consumer) for stream in streams)
            return answer

        found = self._entries(self.patiently(once, f"read {group}", "wait" if block_s > 0 else "redis"))
        self._last_read.update({(stream, consumer): entry for stream, (entry, _) in found})
        return found

    def read_again(self, stream: str, consumer: str) -> None:
        """Let the next `read` begin with all pending entries of this consumer, seen or not."""
        self._unsure.add((stream, consumer))
        self._last_read.pop((stream, consumer), None)

    def _or_groups(self, action: Callable[[], Any]) -> Any:
        """Redis's reply; an empty one if the groups were lost, which are then made again."""
        try:
            return action()
        except redis.exceptions.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._recreate_groups()
            return []

    def _entries(self, answer: Any) -> list[tuple[str, Entry]]:
        found = []
        for name, entries in answer or []:
            stream = name.decode()[len(self.prefix) :]
            found += [(stream, (entry, values or {})) for entry, values in entries]
        return found

    def claim_chunks(
        self, consumer: str, *, idle_s: float, count: int, streams: Sequence[str] | None = None
    ) -> list[tuple[str, Entry, int]]:
        """Notices in streams of chunks (None: those of the one teacher) of workers that have been silent for `idle_s`:
        stream, entry, and number of takeovers of its rollout without progress. At most `count` of each stream; none
        while `may_claim` is False."""
        if not self.may_claim:
            return []
        streams = self.chunk_streams() if streams is None else streams
        idle_ms = int(idle_s * 1000)
        replies = self.call_all([scripts.claim(stream, consumer, idle_ms, count) for stream in streams])
        if any(reply.lost for reply in replies):
            self.patiently(
                self._recreate_groups, "claim"
            )  # entries claimed from the other streams are ours nevertheless
        return [
            (stream, entry, takeovers)
            for stream, reply in zip(streams, replies, strict=True)
            for entry, takeovers in reply.notices
        ]

    def attempt(self, rid: str, role: str) -> int:
        """Record the start of work on a rollout that may kill this process; returns the starts without an end."""
        return self.call(scripts.attempt(rid, role, "begin"))

    def attempt_over(self, rid: str, role: str) -> None:
        """Record the end of work on a rollout, with any result: this process survived it."""
        self.call(scripts.attempt(rid, role, "over"))

    def fields(self, rids_and_fields: Iterable[tuple[str, Sequence[str]]]) -> list[list[bytes | None]]:
        """Fields of several rollouts' hashes in one round trip."""
        wanted = list(rids_and_fields)

        def once() -> list[list[bytes | None]]:
            pipe = self.client.pipeline(transaction=False)
            for rid, names in wanted:
                pipe.hmget(self.key(f"rollout:{rid}"), list(names))
            return list(pipe.execute())

        return self.patiently(once, "fields") if wanted else []

    def rollout(self, rid: str) -> dict[bytes, bytes]:
        """A whole record; empty if there is none."""
        return next(self.rollouts([rid]))

    def rollouts(self, rids: Sequence[str]) -> Iterator[dict[bytes, bytes]]:
        """Whole records, in the order of the ids; a few per round trip, because they are large."""
        for first in range(0, len(rids), RECORDS_AT_A_TIME):
            yield from self._records(rids[first : first + RECORDS_AT_A_TIME])

    def _records(self, rids: Sequence[str]) -> list[dict[bytes, bytes]]:
        def once() -> list[dict[bytes, bytes]]:
            pipe = self.client.pipeline(transaction=False)
            for rid in rids:
                pipe.hgetall(self.key(f"rollout:{rid}"))
            return [dict(record) for record in pipe.execute()]

        return self.patiently(once, "rollouts")

    def fail(
        self,
        rid: str,
        stage: str,
        reason: str,
        *,
        max_attempts: int,
        shown: bytes = b"",
        at: tuple[str, str, bytes] | None = None,
    ) -> bool:
        """Report a rollout or notice that could not be read; True if it was given up, which is counted in the
        metrics. `at`: stream, group, entry."""
        stream, group, entry = at or ("", "", b"")
        report = secrets.token_hex(8)
        call = scripts.fail(rid, stage, reason[:300], max_attempts, shown[:256], stream, group, entry, report)
        given_up = self.call(call).word is Failed.DEAD
        metrics.dead_letters.labels(stage).inc(given_up)
        return given_up

    def reopen(self, config: str) -> None:
        """Resume a run with this resolved config."""
        self.call(scripts.reopen(config))

    def send_back(self, entry: str, rid: str, problem: int | None) -> SentBack:
        """Remove a dead letter with its rollout's record; with a problem, have the feeder admit it again."""
        return self.call(scripts.again(entry, rid, problem))

    def memory(self) -> dict[str, Any]:
        """INFO memory: `used_memory`, `maxmemory` (bytes; 0: no limit) and more. No limit for a user who may not call
        INFO."""
        try:
            return dict(self.patiently(lambda: self.client.info("memory"), "memory"))
        except redis.exceptions.NoPermissionError:
            return {"used_memory": 0, "maxmemory": 0}

    # --- the run's state ---------------------------------------------------------------------------------------

    def requests_by_server(self, count: int) -> list[list[Entry]]:
        """`requests`, of each data server."""
        return [self.requests(count)]

    def open_rollouts(self) -> list[str]:
        """Rollouts that are admitted and not booked, by their ids."""
        return sorted(rid.decode() for rid in self.patiently(lambda: self.client.smembers(self.key("open")), "open"))

    def cursors(self) -> list[int]:
        """Number of rollouts admitted so far on each data server."""
        return [int(self.patiently(lambda: self.client.get(self.key("cursor")), "cursor") or 0)]

    def ledger(self) -> dict[str, int]:
        ledger = self.patiently(lambda: self.client.hgetall(self.key("ledger")), "ledger")
        return {name.decode(): int(value) for name, value in ledger.items()}

    def minima(self, teacher: str = "") -> list[float]:
        """The buffer of window minima of a teacher's rollouts, oldest first."""
        key = self.key(teachers.of(teacher, "minima"))
        stored = self.patiently(lambda: self.client.lrange(key, 0, -1), "minima")
        return [float(value) for value in stored]

    def threshold(self, teacher: str = "") -> bytes:
        """The threshold in force for new rollouts of a teacher, as stored: a number or "inactive"."""
        key = self.key(teachers.of(teacher, "threshold"))
        return self.patiently(lambda: self.client.get(key), "threshold") or b"inactive"

    def requests(self, count: int) -> list[Entry]:
        """The oldest entries of `again`: rollouts that operators sent back."""
        return list(self.patiently(lambda: self.client.xrange(self.key("again"), count=count), "again"))

    def requests_waiting(self) -> int:
        """Number of rollouts that were sent back and have not been admitted again."""
        return int(self.patiently(lambda: self.client.xlen(self.key("again")), "again"))

    def dead_letters(self, first: str, last: str, count: int) -> list[Entry]:
        """Entries of `dead` from one id to another."""
        key = self.key("dead")
        return list(self.patiently(lambda: self.client.xrange(key, first, last, count=count), "dead letters"))

    def record_states(self, rids: Sequence[str]) -> list[RecordState]:
        """State of rollouts, with their attempts and claims, in one round trip."""

        def once() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for rid in rids:
                pipe.sismember(self.key("open"), rid)
                pipe.exists(self.key(f"rollout:{rid}"))
                pipe.hmget(self.key(f"rollout:{rid}"), ["attempts", "claims"])
            return list(pipe.execute())

        answers = self.patiently(once, "rollouts")
        return [
            RecordState(bool(is_open), bool(there), attempts or b"", claims or b"")
            for is_open, there, (attempts, claims) in zip(answers[::3], answers[1::3], answers[2::3], strict=True)
        ]

    def rewarded(self, rids: Sequence[str]) -> list[Rewarded]:
        """What is stored for the rewards of rollouts, in one round trip.

        Whether a record is there is asked before its standing, which is stored before the record is removed: a rollout
        of an open group that has neither was never admitted.
        """

        def once() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            for rid in rids:
                pipe.exists(self.key(f"rollout:{rid}"))
                pipe.hmget(self.key("rewards"), [rid, f"group:{rid}"])
            return list(pipe.execute())

        answers = self.patiently(once, "rewards") if rids else []
        return [
            Rewarded(bool(there), *(None if value is None else value.decode("ascii", "replace") for value in values))
            for there, values in zip(answers[::2], answers[1::2], strict=True)
        ]

    def rewards_kept(self) -> list[str]:
        """Rollouts whose standing is stored."""
        names = self.patiently(lambda: self.client.hkeys(self.key("rewards")), "rewards")
        return [name.decode("ascii", "replace") for name in names if not name.startswith(b"group:")]

    def now_s(self) -> float:
        """Redis's clock."""
        seconds, micros = self.patiently(self.client.time, "time")
        return float(seconds + micros / 1e6)

    def backlog(self) -> Backlog:
        """Waiting work in the streams and Redis's memory, in one round trip. Values that Redis did not give are left
        out."""
        groups = self.groups

        def ask() -> list[Any]:
            pipe = self.client.pipeline(transaction=False)
            pipe.time()
            pipe.info("memory")
            pipe.xlen(self.key("dead"))
            for name, group in groups:
                pipe.xlen(self.key(name))
                pipe.xpending(self.key(name), group)
            return list(pipe.execute(raise_on_error=False))

        (seconds, _), memory, dead, *answers = self.patiently(ask, "streams")
        streams: dict[str, tuple[int, float]] = {}
        for (name, _), size, pending in zip(groups, answers[::2], answers[1::2], strict=True):
            if isinstance(size, Exception) or isinstance(pending, Exception):
                continue  # a group that was lost: its reader makes it again
            oldest_s = max(0.0, seconds - unix_s(pending["min"])) if pending["pending"] else 0.0
            streams[name] = size, oldest_s
        info, dead_letters = (None if isinstance(one, Exception) else one for one in (memory, dead))
        return Backlog(info, dead_letters, streams)

    # --- policy, workers ---------------------------------------------------------------------------------------

    def policy(self) -> dict[str, str]:
        answer = self.patiently(lambda: self.client.hgetall(self.key("policy")), "policy")
        return {name.decode("ascii", "replace"): value.decode("ascii", "replace") for name, value in answer.items()}

    def refuse(self, version: int) -> None:
        """Report that announced weights cannot be loaded."""
        self.once(scripts.refused(version))

    def steps(self) -> tuple[int, int]:
        """Optimizer steps done, and those that a checkpoint covers; 0 if missing or not a number."""
        policy = self.policy()
        done, covered = (policy.get(name, "") for name in ("step", "covered"))
        return (int(done) if done.isdecimal() else 0), (int(covered) if covered.isdecimal() else 0)

    def generated(self) -> int:
        """Tokens that rollout workers have written so far, kept or not, in both arms; 0 if it is not a number."""
        count = self.patiently(lambda: self.client.hget(self.key("policy"), "generated"), "generated")
        return int(count) if isinstance(count, bytes) and count.isdigit() else 0

    def seen(
        self, worker: str, *, role: str, roster: Roster | None = None, teacher: str = "", **facts: str | int
    ) -> None:
        """Send a worker's heartbeat with facts about it; with a roster, also update that. `teacher`: whose of several
        it is.

        One try, safe from any thread: the next heartbeat repeats it.
        """
        silence_ms = int(roster.silence_s * 1000) if roster else 0
        fields = {"role": role, **({"teacher": teacher} if teacher else {}), **facts}.items()
        group = teachers.of(teacher, role)
        sight = self.once(scripts.seen(worker, group, silence_ms, roster.revision if roster else b"", fields))
        if roster and sight and sight.revision != roster.revision:
            # Names first: another thread that sees this revision sees no older names.
            roster.names = sight.names
            roster.revision = sight.revision

    def gone(self, worker: str, *, role: str, streams: Sequence[str] = (), teacher: str = "") -> None:
        """Report that a worker has ended; `streams`: those that it read in its role's group."""
        self.once(scripts.gone(worker, teachers.of(teacher, role), streams))

    def sweep(self, silent_s: float) -> int:
        """Remove the names of killed workers, once others have taken over what they held; returns how many."""
        pairs = [pair for pair in self.groups if pair[1] in ("rollout", "teacher")]
        return self.call(scripts.sweep(int(silent_s * 1000), pairs))

    def once(self, call: Call[R]) -> R | None:
        """Run a script once; its reply, or None if there was none. Raises no error of Redis."""
        try:
            (answer,) = self._evaluate([call])
        except (redis.exceptions.RedisError, OSError) as error:
            answer = error
        if isinstance(answer, _MAY_PASS):
            return None
        if isinstance(answer, Exception):
            log.warning("%s was refused: %s", call.script, answer)
            return None
        reply = scripts.answered(answer)
        return None if scripts.run_is_gone(reply) else call.read(reply)

    def live(self, within_s: float) -> dict[str, dict[str, str]]:
        """Workers seen within so many seconds (Redis's clock), with the facts of their last heartbeat."""

        def once() -> dict[str, dict[str, str]]:
            now = self.client.time()[0]
            names = [name.decode() for name in self.client.zrangebyscore(self.key("workers"), now - within_s, "+inf")]
            pipe = self.client.pipeline(transaction=False)
            for name in names:
                pipe.hgetall(self.key(f"worker:{name}"))
            return {
                name: {field.decode(): value.decode() for field, value in facts.items()}
                for name, facts in zip(names, pipe.execute(), strict=True)
            }

        return self.patiently(once, "live")


def unix_s(entry: bytes) -> float:
    """When an entry was added to its stream, by Redis's clock. Raises ValueError for an invalid id."""
    return int(entry.split(b"-")[0]) / 1000


def shown(fields: Mapping[bytes, bytes]) -> bytes:
    """The beginning of a notice, for a dead letter: the notice may have megabytes."""
    return repr({name[:40]: value[:100] for name, value in islice(fields.items(), 4)}).encode()[:256]


def open_plane(
    config: Config, client: redis.Redis, run_key: str, stop: threading.Event | None = None, server: str = "Redis"
) -> Plane:
    return Plane(
        client,
        run_key,
        shards=config.redis.shards,
        wait_s=config.liveness.redis_wait_s,
        claim_pause_s=config.liveness.claim_s,
        stop=stop,
        server=server,
        teachers=tuple(config.all_teachers),
    )


def create_run(client: Any, config: Config, run_key: str) -> None:
    """Create a run: config, state and groups. Does nothing to a run that exists."""
    plane = open_plane(config, client, run_key)
    if client.get(plane.key("run")) is None:
        plane.create_groups()
        client.set(plane.key("config"), config.to_yaml())
        client.set(plane.key("run"), "open")
    if client.hget(RUNS, config.name) != run_key.encode():  # only if needed: a full Redis refuses the write
        client.hset(RUNS, config.name, run_key)


def current_run(client: Any, name: str) -> str | None:
    value = client.hget(RUNS, name)
    return value.decode() if isinstance(value, bytes) else None


def new_run_key(name: str) -> str:
    return f"{name}-{secrets.token_hex(4)}"
