"""The fault proxy harms what it says, and nothing else: an echo server behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import pytest_asyncio

from faultproxy import FaultProxy


class Line(NamedTuple):
    """A proxy and a connection through it."""

    proxy: FaultProxy
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def echo(self, data: bytes, count: int | None = None) -> bytes:
        """Send data and read as much, or `count` bytes."""
        self.writer.write(data)
        return await self.reader.readexactly(len(data) if count is None else count)


@pytest_asyncio.fixture
async def line() -> AsyncIterator[Line]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write(b"the end")
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        async with FaultProxy(server.sockets[0].getsockname()[1]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            async with asyncio.timeout(20):
                yield Line(proxy, reader, writer)
            writer.close()
        assert proxy.num_open == 0


async def test_without_faults_bytes_pass_unharmed(line: Line) -> None:
    data = bytes(range(256)) * 2000
    assert await line.echo(data) == data
    assert line.proxy.num_open == 1
    line.writer.write_eof()
    assert await line.reader.read() == b"the end"


async def test_delay(line: Line) -> None:
    line.proxy.delay = 0.2
    began = time.monotonic()
    assert await line.echo(b"there and back") == b"there and back"
    assert time.monotonic() - began >= 0.4


async def test_throttle(line: Line) -> None:
    line.proxy.rate = 10_000
    began = time.monotonic()
    assert await line.echo(b"x" * 5_000) == b"x" * 5_000
    assert time.monotonic() - began >= 0.4


async def test_silence_ends_with_nothing_lost(line: Line) -> None:
    line.proxy.silent = True
    echo = asyncio.create_task(line.echo(b"hello"))
    done, _ = await asyncio.wait({echo}, timeout=0.3)
    assert not done
    line.proxy.calm()
    assert await echo == b"hello"


async def test_a_lost_byte_is_one_byte(line: Line) -> None:
    line.proxy.loss = 1.0
    assert len(await line.echo(b"0123456789", 8)) == 8  # one is lost on either way
    assert line.proxy.num_pieces_harmed == 2


async def test_a_cut_looks_like_an_end(line: Line) -> None:
    await line.echo(b"hello")
    assert line.proxy.cut() == 1
    assert await line.reader.read() == b""


async def test_a_reset_looks_like_a_break(line: Line) -> None:
    await line.echo(b"hello")
    assert line.proxy.reset() == 1
    with pytest.raises(ConnectionResetError):
        await line.reader.read()


async def test_a_half_close_lets_the_answer_through(line: Line) -> None:
    await line.echo(b"hello")
    assert line.proxy.half_close() == 1
    assert await line.reader.read() == b"the end"


async def test_new_connections_can_be_refused(line: Line) -> None:
    line.proxy.refuse = True

    async def connect() -> bytes:
        reader, _ = await asyncio.open_connection("127.0.0.1", line.proxy.port)
        return await reader.read()

    with pytest.raises(ConnectionResetError):
        await connect()
    assert await line.echo(b"hello") == b"hello"
