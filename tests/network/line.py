"""A long line before a server: what is sent takes a time on its way, and connections break now and then.

    python tests/network/line.py --listen 10.77.0.1:6379 --server 127.0.0.1:6380 --delay-ms 20 --break-every-s 8

For kernels without netem. Every piece of bytes is let go `delay` after it came, in either direction, whatever else is
on the way: the line is long, not narrow, and an answer comes two delays later than it would. Connecting takes no time
of its own: the kernel answers before the line is asked.

A break hits one connection, of a host drawn at random, one with something on its way if there is any. Three of four
are reset: both ends learn of it at once, and what was on the way is lost. The fourth goes dead: nothing passes any
more, and neither end is told.

Prints `ready` when it listens, and on SIGTERM, as JSON, what it did to whom.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ops.chaos.relay import Link, Relay, Side

_ON_THE_WAY = 1 << 24  # bytes, in one direction of a connection: at 20 ms no limit below 800 MB/s
_BACKLOG = 512
_DEAD_S = 30.0  # after which a dead connection is closed: the line must not collect them
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close means reset
Address = tuple[str, int]


@dataclass(slots=True)
class Traffic:
    """What the line did for one host, and to it."""

    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    reset: int = 0
    dead: int = 0
    bytes_lost: int = 0


class Line(Relay):
    """`break_every_s`: mean, None for never. When comes from `rng` alone; which connection depends on the traffic."""

    def __init__(
        self,
        server: Address,
        *,
        delay_s: float,
        break_every_s: float | None,
        rng: random.Random,
        dead_s: float = _DEAD_S,
    ) -> None:
        super().__init__()
        self.delay_s, self.dead_s = delay_s, dead_s
        self.hosts: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._server, self._break_every_s, self._rng = server, break_every_s, rng
        self._breaks = 0

    def accept(self) -> Side:
        return LongLink(self).client

    async def dial(self, side: Side) -> None:
        await asyncio.get_running_loop().create_connection(lambda: side, *self._server)

    async def serve(self, listen: Address, stop: asyncio.Event, ready: Callable[[int], object]) -> None:
        """Relay until `stop`; `ready` is called with the port. Raises OSError when it cannot listen there."""
        server = await asyncio.get_running_loop().create_server(self.accept, *listen, backlog=_BACKLOG)
        breaking = asyncio.create_task(self._break_now_and_then())
        ready(server.sockets[0].getsockname()[1])
        try:
            await stop.wait()
        finally:
            server.close()
            breaking.cancel()
            await self.break_off()

    async def _break_now_and_then(self) -> None:
        while self._break_every_s is not None:
            await asyncio.sleep(self._rng.expovariate(1 / self._break_every_s))
            self.break_one()

    def break_one(self) -> None:
        links = defaultdict(list)
        for link in {side.link for side in self.sides}:
            if isinstance(link, LongLink) and not link.dead:
                links[link.host].append(link)
        if not links:
            return
        mine = links[self._rng.choice(sorted(links))]
        link = self._rng.choice([link for link in mine if link.on_the_way] or mine)
        self._breaks += 1
        if self._breaks % 4:
            link.reset()
        else:
            link.die()


@dataclass(slots=True)
class _Way:
    """One direction of a link: what was read and not let go, and when it is due (b"": an end)."""

    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    size: int = 0


class LongLink(Link):
    """A connection over the line."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.host, self.dead = "", False
        self._line = line
        self._ways = {self.client: _Way(), self.server: _Way()}
        self._sockets: list[socket.socket] = []

    @property
    def on_the_way(self) -> int:
        return sum(way.size for way in self._ways.values())

    def made(self, side: Side, transport: asyncio.BaseTransport) -> None:
        self._sockets.append(transport.get_extra_info("socket"))
        if side is self.client:
            self.host = transport.get_extra_info("peername")[0]
            self._line.hosts[self.host].connections += 1
        super().made(side, transport)

    def received(self, side: Side, data: bytes) -> None:
        traffic = self._line.hosts[self.host]
        if side is self.client:
            traffic.bytes_up += len(data)
        else:
            traffic.bytes_down += len(data)
        self._put(side, data)

    def lost(self, side: Side) -> None:
        """The other end learns of it when what was sent before has arrived."""
        self._put(side, b"")

    def _put(self, side: Side, data: bytes) -> None:
        if self.dead:
            return
        loop, way = asyncio.get_running_loop(), self._ways[side]
        way.waiting.append((loop.time() + self._line.delay_s, data))
        way.size += len(data)
        if way.size >= _ON_THE_WAY:
            side.pause("line")
        if len(way.waiting) == 1:
            loop.call_at(way.waiting[0][0], self._let_go, side)

    def _let_go(self, side: Side) -> None:
        loop, way = asyncio.get_running_loop(), self._ways[side]
        while way.waiting and way.waiting[0][0] <= loop.time():
            _, data = way.waiting.popleft()
            way.size -= len(data)
            if data:
                self.other(side).write(data)
            else:
                self.other(side).close()
        if way.size < _ON_THE_WAY:
            side.resume("line")
        if way.waiting:
            loop.call_at(way.waiting[0][0], self._let_go, side)

    # --- breaks ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Both ends get a reset; what was on the way is lost."""
        self._line.hosts[self.host].reset += 1
        self._lose()
        self._abort()

    def die(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._line.hosts[self.host].dead += 1
        self._lose()
        asyncio.get_running_loop().call_later(self._line.dead_s, self._abort)

    def _lose(self) -> None:
        self._line.hosts[self.host].bytes_lost += self.on_the_way
        self.dead = True
        for way in self._ways.values():
            way.waiting.clear()
            way.size = 0

    def _abort(self) -> None:
        for side, sock in zip((self.client, self.server), self._sockets, strict=False):
            if side.open:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            side.abort()


def address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


async def _main(arguments: argparse.Namespace) -> None:
    line = Line(
        arguments.server,
        delay_s=arguments.delay_ms / 1000,
        break_every_s=arguments.break_every_s,
        rng=random.Random(arguments.seed),
    )
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await line.serve(arguments.listen, stop, lambda _: print("ready", flush=True))
    print(json.dumps({host: asdict(traffic) for host, traffic in sorted(line.hosts.items())}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A long line before a server.")
    parser.add_argument("--listen", type=address, required=True)
    parser.add_argument("--server", type=address, required=True)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--break-every-s", type=float)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(_main(parser.parse_args()))
