"""A relay between the processes of a run and their Redis, which disturbs the traffic of one of them on request.

All processes of a run reach Redis through it all the time. It identifies the process of a connection by the pid of the
peer. Without a fault it passes on whole requests and whole replies as they come; it looks only for where they end, so
that a fault can begin and end in the middle of traffic. What it can do to a process, for a time:

    delay       every request waits
    hold        nothing passes in either direction
    cut         connections break in the middle of a request
    duplicate   what is sent once arrives twice
    swap        the scripts of one pipeline arrive in reverse order; a script that came alone arrives once more, later

Only Katana's scripts (EVAL, EVALSHA) are duplicated, swapped and sent late: they are what the design promises to fence.
Reads by XREADGROUP are copied if the caller asks for it; a copy's entries become pending, and no process sees them.
Never copied: blocking commands, commands in MULTI, any of a database other than 0 (1 is the broker's).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ops.chaos.relay import Link, Relay, Side

log = logging.getLogger("katana.chaos.proxy")
Frame = bytes | bytearray

_CRLF = b"\r\n"
_LF, _PUSH, _ATTRIBUTE = ord("\n"), ord(">"), ord("|")
_BULK = frozenset(b"$=!")
_LINE = frozenset(b"+-:_#,(")
_AGGREGATE = {ord("*"): 1, ord("~"): 1, _PUSH: 1, ord("%"): 2, _ATTRIBUTE: 2}  # elements for each one announced
_MAX_LINE = 1 << 16

_SCRIPTS = frozenset((b"EVALSHA", b"EVAL"))
_SESSION = frozenset((b"HELLO", b"AUTH", b"SELECT"))
# After these, replies no longer come one to a request.
_UNCOUNTED = frozenset((b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE", b"MONITOR", b"SYNC", b"PSYNC", b"RESET"))
_NOTED = _SESSION | _UNCOUNTED | {b"MULTI", b"EXEC", b"DISCARD", b"CLIENT"}

_GATHER_S = 0.005  # a pipeline comes in parts: so long after one the next is waited for
_LATE_S = (0.2, 2.0)
_MAX_LATE = 256  # copies on their way at a time; the memory and the connections that they may take
_LATE_TIMEOUT_S = 10.0
_BACKLOG = 512


class Frames:
    """Cuts a stream of RESP (2 or 3) into whole requests or replies, wherever it was cut on its way."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # a frame that is not whole yet
        self._at, self._owed = 0, 1  # where in it the next element begins; elements that it still lacks

    @property
    def partial(self) -> bool:
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are now whole. Raises ValueError on what is not RESP."""
        text: Frame = data
        if self._buffer:
            self._buffer += data
            text = self._buffer
        frames: list[Frame] = []
        begin, at, owed, size = 0, self._at, self._owed, len(text)
        while at <= size:
            if at > begin and text[at - 1] != _LF:
                raise ValueError(f"no line end after an element: {bytes(text[max(begin, at - 20) : at])!r}")
            if not owed:
                frames.append(text[begin:at])
                begin, owed = at, 1
            end = text.find(_CRLF, at)
            if end < 0:
                if size - at > _MAX_LINE:
                    raise ValueError(f"not RESP: {bytes(text[at : at + 20])!r}")
                break
            if text[at] in _BULK:
                length = int(text[at + 1 : end])
                at = end + length + 4 if length >= 0 else end + 2
                owed -= 1
            else:
                owed += _missing_after(text[at:end])
                at = end + 2
        self._at, self._owed = at - begin, owed
        if text is data:
            self._buffer += data[begin:]
        else:
            del self._buffer[:begin]
        return frames

    def rest(self) -> bytes:
        """The part of a frame that is there, taken out: the stream is no longer followed."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def _missing_after(line: Frame) -> int:
    """By how much the line of an element that is not a bulk string changes the count of missing elements."""
    kind = line[0] if line else 0
    if kind in _LINE:
        return -1
    if kind in _AGGREGATE:
        # An attribute does not count as an element: the element that it describes follows.
        return max(int(line[1:]), 0) * _AGGREGATE[kind] - (kind != _ATTRIBUTE)
    raise ValueError(f"not RESP: {bytes(line[:20])!r}")


def arguments(request: Frame) -> list[bytes]:
    """The words of a whole request. Raises ValueError when it is not an array of bulk strings."""
    words = []
    end = request.find(_CRLF)
    if request[:1] != b"*":
        raise ValueError(f"not a request: {bytes(request[:20])!r}")
    for _ in range(int(request[1:end])):
        at = end + 2
        end = request.find(_CRLF, at)
        if request[at : at + 1] != b"$":
            raise ValueError(f"not a request: {bytes(request[:20])!r}")
        at, end = end + 2, end + 2 + int(request[at + 1 : end])
        words.append(bytes(request[at:end]))
    return words


def request(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _name(frame: Frame) -> bytes:
    """The command of a request, in capitals. Raises ValueError when it is not an array of bulk strings."""
    parts = frame[:64].split(_CRLF, 3)
    if frame[:1] != b"*" or len(parts) < 4:
        raise ValueError(f"not a request: {bytes(frame[:20])!r}")
    return bytes(parts[2]).upper()


def unblocked(frame: Frame) -> bytes | None:
    """An XREADGROUP for new entries, without its BLOCK; None for one that only repeats what its consumer has."""
    words = arguments(frame)
    upper = [word.upper() for word in words]
    streams = upper.index(b"STREAMS", 4)
    if b">" not in words[streams:]:
        return None
    if b"BLOCK" in upper[4:streams]:
        at = upper.index(b"BLOCK", 4)
        del words[at : at + 2]
    return request(words)


@dataclass(slots=True)
class Hits:
    """What a fault has done so far. Commands; for `held`, stretches of traffic; for `cut`, connections."""

    delayed: int = 0
    duplicated: int = 0
    swapped: int = 0
    replayed: int = 0
    held: int = 0
    cut: int = 0


@dataclass(frozen=True, slots=True)
class _Fault:
    until: float  # time.monotonic
    seconds: float = 0.0
    reads: bool = False
    hits: Hits = field(default_factory=Hits)


def _idle(reply: Frame) -> bool:
    """True where the command did nothing: a script that Redis did not know, a read that found no entry."""
    return reply.startswith((b"-NOSCRIPT", b"*-1\r\n", b"_\r\n"))


@dataclass(slots=True)
class _Dropped:
    """Place of a reply that the client must not see."""

    hits: Hits

    def take(self, reply: Frame) -> list[Frame]:
        self.hits.duplicated += not _idle(reply)
        return []


@dataclass(slots=True)
class _Reversed:
    """Place of each reply of a pipeline that was sent in reverse order."""

    missing: int
    hits: Hits
    replies: list[Frame] = field(default_factory=list)

    def take(self, reply: Frame) -> list[Frame]:
        self.replies.append(reply)
        self.hits.swapped += not _idle(reply)
        return self.replies[::-1] if len(self.replies) == self.missing else []


class RedisProxy(Relay):
    """Listens on `listen`, relays to `upstream`, both Unix sockets; a thread of this process.

    A thread is enough: relaying takes a fraction of a core, and the harness around it mostly waits. `rng` belongs to
    the proxy alone: how often it is asked depends on the traffic, so sharing it would spoil the caller's own draws.
    """

    def __init__(self, listen: Path, upstream: Path, rng: random.Random | None = None) -> None:
        super().__init__()
        self.rng = rng or random.Random(0)
        self._listen, self._upstream = listen, upstream
        self._faults: dict[int, dict[str, _Fault]] = {}  # never changed, only replaced: two threads use it
        self._late: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()

    def start(self) -> None:
        """Listen. Raises OSError when the socket cannot be made there; its path may have 108 bytes."""
        self._listen.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.bind(str(self._listen))
            self._listen.chmod(0o700)  # no client can connect before it listens
        except OSError:
            server.close()
            raise
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(server, ready)), name="redis-proxy", daemon=True
        )
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Break off every connection and end. The socket is taken away."""
        if self._thread is None:
            return
        self._on_loop(self._stop.set)
        self._thread.join()
        self._thread = None
        self._listen.unlink(missing_ok=True)

    # --- faults, from any thread -------------------------------------------------------------------------------

    def delay(self, pid: int, seconds: float, for_s: float) -> Hits:
        """Each request waits for `seconds`, half as long to half as long again."""
        return self._set(pid, "delay", _Fault(time.monotonic() + for_s, seconds=seconds))

    def hold(self, pid: int, for_s: float) -> Hits:
        """Nothing passes, and nothing is closed."""
        return self._set(pid, "hold", _Fault(time.monotonic() + for_s))

    def duplicate(self, pid: int, for_s: float, *, reads: bool = False) -> Hits:
        """Each script is sent twice; the client sees the first reply or the second."""
        return self._set(pid, "duplicate", _Fault(time.monotonic() + for_s, reads=reads))

    def swap(self, pid: int, for_s: float, *, reads: bool = False) -> Hits:
        """Pipelines of scripts are sent in reverse order; single ones again after 0.2 to 2 s, by another connection."""
        return self._set(pid, "swap", _Fault(time.monotonic() + for_s, reads=reads))

    def cut(self, pid: int, within_s: float = 5.0) -> Hits:
        """Break each of the connections once: now if a request is under way, else in its next one.

        Of that one Redis gets half or all; nothing is answered. What is silent for `within_s` is closed all the same.
        """
        hits, begun = Hits(), threading.Event()

        def begin() -> None:
            for link in {side.link for side in self.sides}:
                if isinstance(link, _Link) and link.pid == pid:
                    link.cut(hits, within_s)
            begun.set()

        self._on_loop(begin)
        begun.wait()
        return hits

    def clear(self, pid: int) -> None:
        """End the faults of a process. What is already held or on its way late is let go when its time comes."""
        self._faults = {other: kinds for other, kinds in self._faults.items() if other != pid}

    def _set(self, pid: int, kind: str, fault: _Fault) -> Hits:
        now = time.monotonic()
        kept = {
            other: {name: old for name, old in kinds.items() if old.until > now}
            for other, kinds in self._faults.items()
            if other == pid or any(old.until > now for old in kinds.values())
        }
        self._faults = kept | {pid: kept.get(pid, {}) | {kind: fault}}
        return fault.hits

    def fault(self, pid: int, kind: str) -> _Fault | None:
        kinds = self._faults.get(pid)
        found = kinds.get(kind) if kinds else None
        return found if found is not None and found.until > time.monotonic() else None

    # --- in the thread -----------------------------------------------------------------------------------------

    def _on_loop(self, action: Callable[[], object]) -> None:
        assert self._loop is not None, "not started"
        self._loop.call_soon_threadsafe(action)

    async def _serve(self, listening: socket.socket, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_unix_server(self.accept, sock=listening, backlog=_BACKLOG)
        ready.set()
        await self._stop.wait()
        server.close()
        await self.break_off()
        for task in self._late:
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)

    def accept(self) -> Side:
        return _Link(self).client

    async def dial(self, side: Side) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(str(self._upstream))  # at once or not at all: asyncio would take "not now" for success
            await asyncio.get_running_loop().create_unix_connection(lambda: side, sock=sock)
        except OSError:
            sock.close()
            raise

    def send_late(self, session: bytes, replies: int, copy: Frame, hits: Hits) -> None:
        if len(self._late) < _MAX_LATE:
            assert self._loop is not None
            task = self._loop.create_task(self._send_late(session, replies, bytes(copy), hits))
            self._late.add(task)
            task.add_done_callback(self._late.discard)

    async def _send_late(self, session: bytes, replies: int, copy: bytes, hits: Hits) -> None:
        """By a connection of its own, as the last words of a broken one would come; its replies are thrown away."""
        await asyncio.sleep(self.rng.uniform(*_LATE_S))
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LATE_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(str(self._upstream))
                try:
                    writer.write(session + copy)
                    frames, answers = Frames(), list[Frame]()
                    while len(answers) <= replies and (data := await reader.read(1 << 16)):
                        answers += [frame for frame in frames.feed(data) if frame[0] != _PUSH]
                    hits.replayed += len(answers) > replies and not _idle(answers[replies])
                finally:
                    writer.transport.abort()


class _Link(Link):
    """A client's connection whose requests and replies are parsed, and disturbed while a fault is active."""

    def __init__(self, proxy: RedisProxy) -> None:
        super().__init__(proxy)
        self._proxy = proxy
        self.pid = 0
        self._requests, self._replies = Frames(), Frames()
        self._batch: list[Frame] = []  # whole requests that wait for the rest of their pipeline
        self._places: deque[_Dropped | _Reversed | None] = deque()  # of replies to come; None: for the client
        self._session: dict[bytes, Frame] = {}  # requests that bring another connection into the same state
        self._database, self._in_multi = b"0", False
        self._raw = False  # no longer followed
        self._cut: Hits | None = None

    def made(self, side: Side, transport: asyncio.BaseTransport) -> None:
        if side is self.client:
            peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self.pid = struct.unpack("3i", peer)[0]
        super().made(side, transport)

    def received(self, side: Side, data: bytes) -> None:
        hold = self._fault("hold")
        if hold is not None:
            hold.hits.held += 1
            side.pause("hold")
            asyncio.get_running_loop().call_later(hold.until - time.monotonic(), self._held, side, data)
            return
        try:
            if side is self.client:
                self._asked(data)
            else:
                self._answered(data)
        except ValueError as error:
            log.warning("connection of process %d closed: %s", self.pid, error)
            self.close()

    def _held(self, side: Side, data: bytes) -> None:
        if side.open:
            side.resume("hold")
            self.received(side, data)

    def _fault(self, kind: str) -> _Fault | None:
        return self._proxy.fault(self.pid, kind)

    # --- a broken connection -----------------------------------------------------------------------------------

    def cut(self, hits: Hits, within_s: float) -> None:
        self._cut = hits
        if self._places or self._batch or self._requests.partial or self.client.paused:
            self._break()
        else:
            asyncio.get_running_loop().call_later(within_s, self._break)

    def _break(self, data: bytes = b"") -> None:
        if self._cut is None or not self.client.open:
            return
        self._cut.cut += 1
        self._cut = None
        self.server.write(data if self._proxy.rng.random() < 0.5 else data[: len(data) // 2])
        self.client.abort()
        self.server.close()

    # --- requests ----------------------------------------------------------------------------------------------

    def _asked(self, data: bytes) -> None:
        if self._cut is not None:
            self._break(data)
            return
        if self._raw:
            self._forward([data])
            return
        waits = bool(self._batch)
        self._batch += self._requests.feed(data)
        if self._fault("swap") is None:
            self._gathered()
        elif self._batch and not waits:  # the parts of a pipeline come one after another
            asyncio.get_running_loop().call_later(_GATHER_S, self._gathered)

    def _gathered(self) -> None:
        """Send whole requests on; while they are to be swapped, not before the rest of their pipeline is here."""
        if not self.client.open or self._cut is not None:
            return
        if self._requests.partial and self._fault("swap") is not None:
            asyncio.get_running_loop().call_later(_GATHER_S, self._gathered)
            return
        batch, self._batch = self._batch, []
        try:
            self._forward(batch)
        except ValueError as error:
            log.warning("connection of process %d closed: %s", self.pid, error)
            self.close()

    def _forward(self, batch: list[Frame]) -> None:
        delay = self._fault("delay") if batch else None
        if delay is None:
            self._send(batch)
        else:
            self.client.pause("delay")
            wait_s = delay.seconds * self._proxy.rng.uniform(0.5, 1.5)
            asyncio.get_running_loop().call_later(wait_s, self._delayed, batch, delay.hits)

    def _delayed(self, batch: list[Frame], hits: Hits) -> None:
        if self.client.open:
            hits.delayed += len(batch)
            self.client.resume("delay")
            try:
                self._send(batch)
            except ValueError as error:
                log.warning("connection of process %d closed: %s", self.pid, error)
                self.close()

    def _send(self, batch: list[Frame]) -> None:
        if not self._raw:
            batch = self._spoiled(batch)
        if batch:
            self.server.write(batch[0] if len(batch) == 1 else b"".join(batch))
        if self._raw:
            self.server.write(self._requests.rest())
            self.client.write(self._replies.rest())

    def _spoiled(self, batch: list[Frame]) -> list[Frame]:
        """What goes to Redis for it; the places of all replies are noted."""
        swap, duplicate = self._fault("swap"), self._fault("duplicate")
        names = [_name(frame) for frame in batch]
        fenced = self._database == b"0" and not self._in_multi and _SCRIPTS.issuperset(names)
        if swap is not None and len(batch) > 1 and fenced:
            self._places.extend([_Reversed(len(batch), swap.hits)] * len(batch))
            return batch[::-1]
        sent: list[Frame] = []
        for name, frame in zip(names, batch, strict=True):
            if name in _NOTED:
                self._note(name, frame)
            if swap is not None and (copy := self._copy(name, frame, swap)) is not None:
                session = b"".join(self._session.values())
                self._proxy.send_late(session, len(self._session), copy, swap.hits)
            if duplicate is not None and (copy := self._copy(name, frame, duplicate)) is not None:
                pair: list[tuple[Frame, _Dropped | None]] = [(copy, _Dropped(duplicate.hits)), (frame, None)]
                for what, place in pair if self._proxy.rng.random() < 0.5 else pair[::-1]:
                    sent.append(what)
                    self._places.append(place)
            else:
                sent.append(frame)
                self._places.append(None)
        return sent

    def _copy(self, name: bytes, frame: Frame, fault: _Fault) -> Frame | None:
        if self._database != b"0" or self._in_multi:
            return None
        if name in _SCRIPTS:
            return frame
        return unblocked(frame) if fault.reads and name == b"XREADGROUP" else None

    def _note(self, name: bytes, frame: Frame) -> None:
        """Keep up with the state of the connection. Raises ValueError when it can no longer be followed."""
        if name in _SESSION:
            self._session.pop(name, None)
            self._session[name] = frame
            if name == b"SELECT":
                self._database = arguments(frame)[1]
        elif name in _UNCOUNTED or (name == b"CLIENT" and b"REPLY" in map(bytes.upper, arguments(frame))):
            if any(place is not None for place in self._places):
                raise ValueError(f"{name.decode()} while a fault is at work")
            self._raw = True
        elif name != b"CLIENT":
            self._in_multi = name == b"MULTI"

    # --- replies -----------------------------------------------------------------------------------------------

    def _answered(self, data: bytes) -> None:
        if self._raw:
            self.client.write(data)
            return
        seen: list[Frame] = []
        for reply in self._replies.feed(data):
            # A push answers nothing, and Redis may speak unasked when it refuses a connection.
            place = self._places.popleft() if self._places and reply[0] != _PUSH else None
            seen += [reply] if place is None else place.take(reply)
        if seen:
            self.client.write(seen[0] if len(seen) == 1 else b"".join(seen))
