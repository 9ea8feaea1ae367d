"""A relay: it holds a client's connection and one to the server for it, and passes bytes on between them.

What every relay needs is here: both ends are read no faster than the other takes it, what was read is passed on before
an end is closed, and nothing is left when the relay ends. Subclasses of `Link` define what else happens to the
traffic: `ops/chaos/proxy.py` disturbs requests and replies of Redis, `tests/network/line.py` adds latency.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import cast

_READ = 1 << 18  # bytes at most


class Relay(ABC):
    """Every connection that one event loop relays."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_READ))  # of every read: there is one thread
        self.sides: set[Side] = set()
        self.connecting: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def dial(self, side: Side) -> None:
        """Connect a side to the server. Raises OSError when it is not there."""

    @abstractmethod
    def accept(self) -> Side:
        """The protocol of a connection that a client makes: its side of a new link."""

    async def break_off(self) -> None:
        """Break off every connection, also those that are being made; returns when there is none."""
        while self.sides or self.connecting:
            for side in list(self.sides):
                side.abort()
            await asyncio.sleep(0)


class Side(asyncio.BufferedProtocol):
    """One end of a relayed connection.

    Buffered: a plain Protocol allocates 256 KiB for each read, which measured twice the CPU of all the rest.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._transport: asyncio.Transport | None = None
        self._reasons: set[str] = set()  # why it is not read from

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.link.relay.sides.add(self)
        self.link.made(self, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.link.relay.buffer

    def buffer_updated(self, size: int) -> None:
        self.link.received(self, bytes(self.link.relay.buffer[:size]))

    def connection_lost(self, error: Exception | None) -> None:
        self.link.relay.sides.discard(self)
        self.link.lost(self)

    def pause_writing(self) -> None:
        self.link.other(self).pause("full")

    def resume_writing(self) -> None:
        self.link.other(self).resume("full")

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def paused(self) -> bool:
        return bool(self._reasons)

    def write(self, data: bytes | bytearray) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause(self, reason: str) -> None:
        self._reasons.add(reason)
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self, reason: str) -> None:
        self._reasons.discard(reason)
        if self._transport is not None and not self._reasons:
            self._transport.resume_reading()

    def close(self) -> None:
        """What was written still goes out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Link(ABC):
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.client, self.server = Side(self), Side(self)

    def other(self, side: Side) -> Side:
        return self.server if side is self.client else self.client

    def made(self, side: Side, transport: asyncio.BaseTransport) -> None:
        """A side is connected: the client's first, which is not read from before the server's is."""
        if side is self.client:
            self.client.pause("connecting")
            task = asyncio.get_running_loop().create_task(self._connect())
            self.relay.connecting.add(task)
            task.add_done_callback(self.relay.connecting.discard)
        else:
            self.client.resume("connecting")

    @abstractmethod
    def received(self, side: Side, data: bytes) -> None:
        """Something came from a side."""

    def lost(self, side: Side) -> None:
        """A side's connection has ended: so does the other's."""
        self.close()

    def close(self) -> None:
        self.client.close()
        self.server.close()

    async def _connect(self) -> None:
        """A server that is away means an end of the client's connection at once, as it would be without a relay."""
        try:
            await self.relay.dial(self.server)
        except OSError:
            self.client.abort()
        if not self.client.open:
            self.server.close()
