"""An app on a real socket of this process, as `toptwo serve` puts it there, and a client of plain bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import uvicorn

from fakes import KEY
from toptwo.api.connection import BoundedHttp
from toptwo.launch import bound_clients

CHAT = "/v1/chat/completions"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Peer:
    """One connection to the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self, seconds: float = 10) -> bytes:
        """All that comes until the server closes; what it did not read counts as that."""
        received = bytearray()
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(1 << 16):
                    received += data
        return bytes(received)

    async def until(self, mark: bytes, seconds: float = 10) -> bytes:
        """All that comes until the mark has come."""
        async with asyncio.timeout(seconds):
            return await self.reader.readuntil(mark)

    def leave(self) -> None:
        """Close at once."""
        self.writer.transport.abort()


@dataclass(frozen=True)
class Loopback:
    """An app that is being served. Its clients' ends are closed with it."""

    server: _Server
    address: tuple[str, int]
    peers: list[Peer] = field(default_factory=list)

    @property
    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    async def connect(self, *, receive_buffer: int | None = None) -> Peer:
        """receive_buffer: bytes that the kernel takes for a client that does not read."""
        client = socket.socket()
        client.setblocking(False)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(client, self.address)
        limit = receive_buffer or 1 << 16
        reader, writer = await asyncio.open_connection(sock=client, limit=limit)
        self.peers.append(Peer(reader, writer))
        return self.peers[-1]


@contextlib.asynccontextmanager
async def served(app: object, *, send_timeout: int = 60) -> AsyncIterator[Loopback]:
    """The app on a port of its own; it must have ended all requests at the end."""
    with socket.socket() as listener:
        bound_clients(listener, send_timeout)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=BoundedHttp,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        server = _Server(config)
        site = Loopback(server, listener.getsockname())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield site
        finally:
            server.should_exit = True
            for peer in site.peers:
                peer.leave()
            await serving


def post(value: object, headers: Sequence[str] = (), path: str = CHAT, key: str = KEY) -> bytes:
    """A request with a JSON body, as bytes."""
    body = json.dumps(value).encode()
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(body)}", *headers]
    return head([*lines, f"authorization: Bearer {key}"]) + body


def get(path: str, headers: Sequence[str] = ()) -> bytes:
    """A request without a body, as bytes."""
    return head([f"GET {path} HTTP/1.1", "host: test", *headers])


def head(lines: Sequence[str]) -> bytes:
    """The head of a request, as bytes."""
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
