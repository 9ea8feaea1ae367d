"""Several data servers: a run's rollouts are spread over them, and each server is a whole plane for its own.

A rollout's keys, notices, verdict and ending are all on one server, named by the hash of its id, so every script is
atomic where it runs and no state spans two servers. The first server, the home, has what the run has once: the policy
pointer and the window minima. Sums, unions and the run's cursor are made by their readers.

A call to a server that does not answer waits for it, as with one server, and meanwhile the caller does nothing on the
others either. So a silent worker is silent everywhere, and no server's work is claimed because another one was away.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import redis

from common import tracing
from common.config import Config, ConfigError
from common.footprint import RECORDS_AT_A_TIME, free_bytes
from common.tracing import SpanKind
from common.wire.entries import age_order, bare, place_in, tagged
from common.wire.plane import Backlog, Plane, RecordState, Rewarded, Roster, create_run, open_plane
from common.wire.scripts import Call, Entry
from common.wire.wake import Waker, wait_for_any

_UNASKED_S = 0.05  # between two looks while a server cannot be asked to say when an entry comes
R = TypeVar("R")
T = TypeVar("T")


class Planes(Plane):
    """The planes of several servers as one. `client` and `key` are the home's."""

    def __init__(self, parts: Sequence[Plane]) -> None:
        self._parts = tuple(parts)
        home = self._parts[0]
        self.client, self.prefix, self.run_key, self.shards = home.client, home.prefix, home.run_key, home.shards
        self.teachers = home.teachers
        self.errors: Callable[[str], None] = lambda kind: None
        for part in parts:
            part.errors = lambda kind: self.errors(kind)
        self._turn = 0  # the server that the next read begins with
        self._wakers = [Waker(part.client) for part in parts]

    # --- where things are ----------------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Plane]:
        return self._parts

    @property
    def home(self) -> Plane:
        return self._parts[0]

    def place_of(self, rid: str) -> int:
        return place_among(len(self._parts), rid)

    def by_server(self, items: Iterable[T], rid_of: Callable[[T], str]) -> list[list[T]]:
        groups: dict[int, list[T]] = {}
        for item in items:
            groups.setdefault(self.place_of(rid_of(item)), []).append(item)
        return [groups[place] for place in sorted(groups)]

    def _place_at(self, at: str | bytes | int) -> int:
        if isinstance(at, int):
            return at
        if isinstance(at, bytes):
            return place_in(at) % len(self._parts)
        return self.place_of(at) if at else 0

    # --- calls ---------------------------------------------------------------------------------------------------

    def call_all(self, calls: Sequence[Call[R]]) -> list[R]:
        """As for one server; one round trip to each that has any of the calls, in the order of their first ones."""
        by_place: dict[int, list[int]] = {}
        for number, call in enumerate(calls):
            by_place.setdefault(self._place_at(call.at), []).append(number)
        replies: dict[int, R] = {}
        for place, numbers in by_place.items():
            answers = self._parts[place].call_all([calls[number] for number in numbers])
            replies.update(zip(numbers, answers, strict=True))
        return [replies[number] for number in range(len(calls))]

    def once(self, call: Call[R]) -> R | None:
        return self._parts[self._place_at(call.at)].once(call)

    def patiently(self, action: Callable[[], T], what: str, kind: SpanKind = "redis") -> T:
        """Of an action at the home."""
        return self.home.patiently(action, what, kind)

    @property
    def failed_calls(self) -> int:  # type: ignore[override]
        return sum(part.failed_calls for part in self._parts)

    @property
    def may_claim(self) -> bool:
        """False after a failed or slow call to any server: the caller waited, and so did all others."""
        return all(part.may_claim for part in self._parts)

    # --- streams -------------------------------------------------------------------------------------------------

    def create_groups(self) -> None:
        for part in self._parts:
            part.create_groups()

    def read(
        self, group: str, consumer: str, streams: Sequence[str], *, count: int, block_s: float
    ) -> list[tuple[str, Entry]]:
        """At most about `count` entries, of each server in turn."""
        found = self._read_each(group, consumer, streams, count)
        until = time.monotonic() + block_s
        while not found and (left_s := until - time.monotonic()) > 0:
            # First the question, then a look: what comes after the look is answered. A server may come to a new
            # question after the look, which another connection sent: a second look is certainly after both.
            keys = [self.key(stream) for stream in streams]
            new = not all(waker.asks(keys) for waker in self._wakers)
            asked = [waker for waker in self._wakers if waker.ask(keys)]
            found = self._read_each(group, consumer, streams, count)
            if not found and new:
                found = self._read_each(group, consumer, streams, count)
            if not found:
                with tracing.span(f"read {group}", "wait"):
                    wait_for_any(asked, min(left_s, _UNASKED_S) if len(asked) < len(self._wakers) else left_s)
                answers = [waker.answered() for waker in asked]
                if any(answers):
                    found = self._read_each(group, consumer, streams, count)
        return found

    def _read_each(self, group: str, consumer: str, streams: Sequence[str], count: int) -> list[tuple[str, Entry]]:
        """What there is now; each call begins with another server."""
        found: list[tuple[str, Entry]] = []
        first, servers = self._turn, len(self._parts)
        self._turn = (first + 1) % servers
        for place in ((first + step) % servers for step in range(servers)):
            came = self._parts[place].read(group, consumer, streams, count=count, block_s=0.0)
            found += [(stream, (tagged(entry, place), values)) for stream, (entry, values) in came]
            if len(found) >= count:
                break
        return found

    def read_again(self, stream: str, consumer: str) -> None:
        for part in self._parts:
            part.read_again(stream, consumer)

    def claim_chunks(
        self, consumer: str, *, idle_s: float, count: int, streams: Sequence[str] | None = None
    ) -> list[tuple[str, Entry, int]]:
        if not self.may_claim:
            return []
        return [
            (stream, (tagged(entry, place), values), takeovers)
            for place, part in enumerate(self._parts)
            for stream, (entry, values), takeovers in part.claim_chunks(
                consumer, idle_s=idle_s, count=count, streams=streams
            )
        ]

    # --- rollouts ------------------------------------------------------------------------------------------------

    def _of_each(
        self, items: Sequence[T], rid_of: Callable[[T], str], ask: Callable[[Plane, list[T]], list[R]]
    ) -> list[R]:
        """What the server of each item's rollout answers, in the order of the items."""
        numbers = self.by_server(range(len(items)), lambda number: rid_of(items[number]))
        found: dict[int, R] = {}
        for group in numbers:
            part = self._parts[self.place_of(rid_of(items[group[0]]))]
            found.update(zip(group, ask(part, [items[number] for number in group]), strict=True))
        return [found[number] for number in range(len(items))]

    def fields(self, rids_and_fields: Iterable[tuple[str, Sequence[str]]]) -> list[list[bytes | None]]:
        return self._of_each(list(rids_and_fields), lambda one: one[0], lambda part, some: part.fields(some))

    def rollouts(self, rids: Sequence[str]) -> Iterator[dict[bytes, bytes]]:
        for first in range(0, len(rids), RECORDS_AT_A_TIME):
            few = rids[first : first + RECORDS_AT_A_TIME]
            yield from self._of_each(few, lambda rid: rid, lambda part, some: list(part.rollouts(some)))

    def record_states(self, rids: Sequence[str]) -> list[RecordState]:
        return self._of_each(rids, lambda rid: rid, lambda part, some: part.record_states(some))

    def rewarded(self, rids: Sequence[str]) -> list[Rewarded]:
        return self._of_each(rids, lambda rid: rid, lambda part, some: part.rewarded(some))

    def rewards_kept(self) -> list[str]:
        return [rid for part in self._parts for rid in part.rewards_kept()]

    def open_rollouts(self) -> list[str]:
        return sorted(rid for part in self._parts for rid in part.open_rollouts())

    # --- the run's state -----------------------------------------------------------------------------------------

    def reopen(self, config: str) -> None:
        for part in reversed(self._parts):  # the home last: its state is the run's
            part.reopen(config)

    def cursors(self) -> list[int]:
        return [cursor for part in self._parts for cursor in part.cursors()]

    def ledger(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for part in self._parts:
            for name, count in part.ledger().items():
                total[name] = total.get(name, 0) + count
        return total

    def minima(self, teacher: str = "") -> list[float]:
        return self.home.minima(teacher)

    def threshold(self, teacher: str = "") -> bytes:
        return self.home.threshold(teacher)

    def generated(self) -> int:
        return sum(part.generated() for part in self._parts)

    def policy(self) -> dict[str, str]:
        return self.home.policy()

    def state(self) -> str | None:
        return self.home.state()

    def now_s(self) -> float:
        """The home's clock."""
        return self.home.now_s()

    def requests(self, count: int) -> list[Entry]:
        return [entry for some in self.requests_by_server(count) for entry in some]

    def requests_by_server(self, count: int) -> list[list[Entry]]:
        return [
            [(tagged(entry, place), values) for entry, values in part.requests(count)]
            for place, part in enumerate(self._parts)
        ]

    def requests_waiting(self) -> int:
        return sum(part.requests_waiting() for part in self._parts)

    def dead_letters(self, first: str, last: str, count: int) -> list[Entry]:
        """As for one server: the oldest `count` of all, those of the same id in the order of their servers."""
        begin, at = bare(first.encode()).decode(), place_in(first.encode())
        found: list[Entry] = []
        for place, part in enumerate(self._parts):
            if first == last and place != at:
                continue
            # After an entry come those of the same id on the servers behind its own.
            own = begin.removeprefix("(") if place > at else begin
            letters = part.dead_letters(own, bare(last.encode()).decode(), count)
            found += [(tagged(entry, place), values) for entry, values in letters]
        return sorted(found, key=lambda one: (age_order(one[0]), place_in(one[0])))[:count]

    # --- memory and backlog --------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """As if all were as full as the fullest: rollouts go to each alike, and it must have room for its own."""
        return all_like_fullest([part.memory() for part in self._parts])

    def backlog(self) -> Backlog:
        parts = [part.backlog() for part in self._parts]
        streams: dict[str, tuple[int, float]] = {}
        for name, (size, oldest_s) in (item for part in parts for item in part.streams.items()):
            before = streams.get(name, (0, 0.0))
            streams[name] = before[0] + size, max(before[1], oldest_s)
        memories = [part.memory for part in parts if part.memory is not None]
        dead = [part.dead for part in parts if part.dead is not None]
        return Backlog(
            all_like_fullest(memories) if len(memories) == len(parts) else None,
            sum(dead) if len(dead) == len(parts) else None,
            streams,
        )

    # --- workers -------------------------------------------------------------------------------------------------

    def seen(
        self, worker: str, *, role: str, roster: Roster | None = None, teacher: str = "", **facts: str | int
    ) -> None:
        """To each server, since each asks by itself whether a worker is silent; the roster is the home's."""
        for place, part in enumerate(self._parts):
            part.seen(worker, role=role, roster=roster if place == 0 else None, teacher=teacher, **facts)

    def gone(self, worker: str, *, role: str, streams: Sequence[str] = (), teacher: str = "") -> None:
        for part in self._parts:
            part.gone(worker, role=role, streams=streams, teacher=teacher)

    def sweep(self, silent_s: float) -> int:
        return sum(part.sweep(silent_s) for part in self._parts)

    def live(self, within_s: float) -> dict[str, dict[str, str]]:
        return self.home.live(within_s)


def place_among(servers: int, rid: str) -> int:
    """The place of the server, of so many, that has a rollout."""
    # Not the bits that choose the shard: each server would use some of its shards only.
    return (zlib.crc32(rid.encode()) >> 16) % servers


def all_like_fullest(memories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `INFO memory` of several servers as one: that of the one with the least room, times their number."""
    fullest = min(memories, key=free_bytes)
    return fullest | {name: fullest[name] * len(memories) for name in ("used_memory", "maxmemory")}


# --- opening ----------------------------------------------------------------------------------------------------------


def open_planes(
    config: Config, clients: Sequence[redis.Redis], run_key: str, stop: threading.Event | None = None
) -> Plane:
    """The plane of a run's data servers, in the order of `redis.data`; of a single one a plain `Plane`."""
    if len(clients) == 1:
        return open_plane(config, clients[0], run_key, stop)
    parts = [
        open_plane(config, client, run_key, stop, server=_server(config, place)) for place, client in enumerate(clients)
    ]
    return Planes(parts)


def create_on(clients: Sequence[redis.Redis], config: Config, run_key: str) -> None:
    """Create a run on those of its data servers that do not have it. Raises ConfigError for servers that have it and
    are not the run's, in this order."""
    plane = open_planes(config, clients, run_key)
    check_places(config, plane)
    # The home last: whoever finds the run there finds it on all.
    for place, part in reversed(list(enumerate(plane.parts))):
        if len(clients) > 1 and part.state() is None:
            part.client.set(part.key("place"), _place(place, len(clients)))
        create_run(part.client, config, run_key)


def check_places(config: Config, plane: Plane) -> None:
    """Raises ConfigError if a server has the run as another one of its servers, or as one of another number: a rollout
    is found by its server's place. A server that lost the run says nothing."""
    count = len(plane.parts)
    for place, part in enumerate(plane.parts):
        known, wanted = part.place(), _place(place, count)
        if known not in (None, wanted):
            raise ConfigError(
                f"redis.data: {_server(config, place)} is server {_shown(wanted)} of the list and has the part of "
                f"server {_shown(known or '')} of run {plane.run_key}: name the servers as when the run was begun"
            )


def _server(config: Config, place: int) -> str:
    return config.redis.servers[place] if place < len(config.redis.servers) else f"data server {place + 1}"


def _place(place: int, count: int) -> str:
    return f"{place}/{count}"


def _shown(place: str) -> str:
    number, _, count = place.partition("/")
    return f"{int(number) + 1} of {count}" if number.isdigit() else repr(place)
