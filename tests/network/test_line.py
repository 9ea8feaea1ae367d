"""The line is as long as it says, not narrow, and breaks as it says. On localhost; needs no rights."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from line import Line, LongLink

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def laid(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], delay_s: float, dead_s: float = 30.0
) -> AsyncIterator[tuple[Line, Callable[[], Awaitable[Streams]]]]:
    """A server, a line to it, and how to connect over it."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    line = Line(
        server.sockets[0].getsockname()[:2], delay_s=delay_s, break_every_s=None, rng=random.Random(1), dead_s=dead_s
    )
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(line.serve(("127.0.0.1", 0), stop, port.set_result))
    where = await port
    try:
        yield line, lambda: asyncio.open_connection("127.0.0.1", where)
    finally:
        stop.set()
        await serving
        server.close()
        assert not line.sides


def links(line: Line) -> list[LongLink]:
    return [side.link for side in line.sides if isinstance(side.link, LongLink) and side is side.link.client]


def test_an_answer_comes_two_delays_later() -> None:
    async def main() -> list[float]:
        async with laid(echo, delay_s=0.03) as (line, connect):
            reader, writer = await connect()
            took = []
            for _ in range(10):
                began = time.monotonic()
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                took.append(time.monotonic() - began)
            writer.close()
            assert (line.hosts["127.0.0.1"].bytes_up, line.hosts["127.0.0.1"].bytes_down) == (10, 10)
            return took

    took = asyncio.run(main())
    assert min(took) >= 0.06
    assert sorted(took)[5] < 0.1


def test_the_line_is_long_and_not_narrow() -> None:
    """64 MB by pieces of 256 KB at most: one delay for each of them, one after another, would be 25 s and more."""
    data = random.Random(0).randbytes(1 << 20) * 64

    async def main() -> float:
        async with laid(echo, delay_s=0.1) as (_, connect):
            reader, writer = await connect()
            began = time.monotonic()
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            return time.monotonic() - began

    assert asyncio.run(main()) < 8


def test_what_was_sent_before_an_end_arrives_and_then_the_end() -> None:
    async def main() -> tuple[bytes, float]:
        came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.set_result(await reader.read(-1))
            writer.close()

        async with laid(serve, delay_s=0.1) as (_, connect):
            _, writer = await connect()
            began = time.monotonic()
            writer.write(b"x" * 100_000)
            writer.close()
            return await came, time.monotonic() - began

    data, took = asyncio.run(main())
    assert data == b"x" * 100_000
    assert took >= 0.1


def test_a_reset_loses_what_is_on_the_way_and_both_ends_learn_of_it() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with pytest.raises(ConnectionResetError):
                while data := await reader.read(100):
                    writer.write(data)
            ended.set()

        async with laid(serve, delay_s=0.2) as (line, connect):
            reader, writer = await connect()
            writer.write(b"abc")
            assert await reader.readexactly(3) == b"abc"
            writer.write(b"lost")
            await asyncio.sleep(0.05)
            line.break_one()
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            await asyncio.wait_for(ended.wait(), 5)
            traffic = line.hosts["127.0.0.1"]
            assert (traffic.reset, traffic.dead, traffic.bytes_lost) == (1, 0, 4)
            assert not links(line)
            reader, writer = await connect()  # the line itself goes on
            writer.write(b"abc")
            assert await reader.readexactly(3) == b"abc"
            writer.close()

    asyncio.run(main())


def test_a_dead_connection_is_silent_until_it_is_cleared_away() -> None:
    async def main() -> None:
        async with laid(echo, delay_s=0.01, dead_s=0.6) as (line, connect):
            reader, writer = await connect()
            writer.write(b"abc")
            assert await reader.readexactly(3) == b"abc"
            (link,) = links(line)
            link.die()
            writer.write(b"into the void")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.3)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), 5)
            writer.close()
            assert line.hosts["127.0.0.1"].dead == 1

    asyncio.run(main())


def test_one_break_in_four_is_silent_and_it_hits_what_is_at_work() -> None:
    async def main() -> None:
        async with laid(echo, delay_s=0.5) as (line, connect):
            idle = [await connect() for _ in range(8)]
            busy = [await connect() for _ in range(4)]
            for _, writer in busy:
                writer.write(b"x")
            while sum(link.on_the_way for link in links(line)) < 4:
                await asyncio.sleep(0.01)
            for _ in busy:
                line.break_one()
            traffic = line.hosts["127.0.0.1"]
            assert (traffic.reset, traffic.dead, traffic.bytes_lost) == (3, 1, 4)
            for _, writer in [*idle, *busy]:
                writer.close()

    asyncio.run(main())


def test_a_server_that_is_away_ends_the_connection_at_once() -> None:
    async def main() -> None:
        async with laid(echo, delay_s=1.0) as (line, connect):
            line._server = ("127.0.0.1", 1)  # nobody listens there
            reader, writer = await connect()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(1), 0.9) == b""
            writer.close()

    asyncio.run(main())
