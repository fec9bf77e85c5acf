"""A TCP proxy that harms what passes: delay, throttle, silence, cut, half-close, reset, lost bytes.

Knows bytes and sockets; must not know what they mean. What its fields say holds from then on, also for
connections that are open; what its methods do befalls the connections that are open when they are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field

PIECE = 16 * 1024  # bytes that are passed on at once, when nothing throttles
TICK = 0.02  # seconds between two looks, for who waits


@dataclass(eq=False)
class _Link:
    """One connection of a client's and its counterpart at the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter


@dataclass
class FaultProxy:
    """Use it as an asynchronous context manager; `port` is then where it listens, on 127.0.0.1.

    target: port of the server, on 127.0.0.1.
    delay: seconds that every piece waits. rate: bytes per second and direction; None for no limit.
    silent: nothing passes, and everything stays open. refuse: new connections are reset at once.
    loss: share of the pieces of which one byte is left out.
    """

    target: int
    delay: float = 0.0
    rate: int | None = None
    silent: bool = False
    refuse: bool = False
    loss: float = 0.0
    seed: int = 0
    port: int = 0
    num_pieces_harmed: int = 0
    _links: set[_Link] = field(default_factory=set)

    async def __aenter__(self) -> FaultProxy:
        self._random = random.Random(self.seed)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        while self._links:
            await asyncio.sleep(TICK)

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return len(self._links)

    def calm(self) -> None:
        """No more faults."""
        self.delay, self.rate, self.silent, self.refuse, self.loss = 0.0, None, False, False, 0.0

    def cut(self) -> int:
        """Close both ends of every connection, as a server that was stopped does. Returns how many."""
        return self._end([writer for link in self._links for writer in (link.client, link.server)])

    def reset(self) -> int:
        """Let both ends of every connection see a reset (RST). Returns how many there were."""
        ends = [writer for link in self._links for writer in (link.client, link.server)]
        for writer in ends:
            _reset(writer)
        return len(ends) // 2

    def half_close(self) -> int:
        """Tell every server that its client has nothing more to say; answers still pass."""
        for link in self._links:
            if link.server.can_write_eof():
                link.server.write_eof()
        return len(self._links)

    def _end(self, writers: list[asyncio.StreamWriter]) -> int:
        for writer in writers:
            writer.close()
        return len(writers) // 2

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.refuse:
            _reset(client)
            return
        try:
            back, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(client)
            return
        link = _Link(client, server)
        self._links.add(link)
        try:
            # Each direction ends by itself: a client that has half-closed still gets its answer.
            await asyncio.gather(self._pass(reader, server), self._pass(back, client))
        finally:
            self._links.discard(link)
            self._end([client, server])

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # One side's end may come as any of these, and be written to by the other.
        with contextlib.suppress(ConnectionError, RuntimeError, OSError):
            while piece := await reader.read(min(PIECE, max(1, (self.rate or PIECE) // 10))):
                await asyncio.sleep(self.delay + (len(piece) / self.rate if self.rate else 0.0))
                while self.silent and not writer.is_closing():
                    await asyncio.sleep(TICK)
                writer.write(self._harmed(piece))
                await writer.drain()
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()
                return
        writer.close()

    def _harmed(self, piece: bytes) -> bytes:
        if self._random.random() >= self.loss:
            return piece
        self.num_pieces_harmed += 1
        at = self._random.randrange(len(piece))
        return piece[:at] + piece[at + 1 :]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection so that the other end sees it broken, not ended."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
