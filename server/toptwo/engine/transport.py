"""MessagePack over ZeroMQ over a Unix socket: how waist 1 is crossed.

Frames are typed msgspec messages, never pickle; what does not decode is dropped. The socket lives in
a directory of mode 0700 and is itself 0600. The engine's side is a ROUTER, so that several API
processes can talk to one engine; each client is known by its routing id.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from toptwo.messages import ClientMessage, EngineMessage

MAX_MESSAGE_BYTES = 256 << 20

_client_decoder = msgspec.msgpack.Decoder(ClientMessage)
_engine_decoder = msgspec.msgpack.Decoder(EngineMessage)
_encoder = msgspec.msgpack.Encoder()
Message = TypeVar("Message")


def _configure(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    socket.linger = 0
    # Both ends are on one machine and every queue is bounded by the requests behind it: dropping
    # or blocking at a high-water mark would lose tokens or stall the engine for all.
    socket.sndhwm = 0
    socket.rcvhwm = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES


def _decode(decoder: msgspec.msgpack.Decoder[Message], frame: bytes) -> Message | None:
    try:
        return decoder.decode(frame)
    except msgspec.MsgspecError:
        return None


class EngineSocket:
    """The engine's end: receives client messages, sends to a client by its routing id."""

    def __init__(self, path: Path) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        _configure(self._socket)
        mask = os.umask(0o177)
        try:
            self._socket.bind(f"ipc://{path}")
        finally:
            os.umask(mask)

    def receive(self, *, block: bool) -> tuple[bytes, ClientMessage] | None:
        """The next message, or None when there is none (without `block`) or it does not decode."""
        if not block and not self._socket.poll(0):
            return None
        frames = self._socket.recv_multipart()
        message = _decode(_client_decoder, frames[-1]) if len(frames) == 2 else None
        return (frames[0], message) if message is not None else None

    def send(self, client: bytes, message: EngineMessage) -> None:
        self._socket.send_multipart([client, _encoder.encode(message)])

    def close(self) -> None:
        self._socket.close()


class ClientSocket:
    """The API process's end, for asyncio. It may connect before the engine has bound."""

    def __init__(self, path: Path) -> None:
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        _configure(self._socket)
        self._socket.connect(f"ipc://{path}")

    async def receive(self) -> EngineMessage | None:
        """The next message; None when it does not decode."""
        frames = await self._socket.recv_multipart()
        return _decode(_engine_decoder, frames[-1])

    async def send(self, message: ClientMessage) -> None:
        await self._socket.send(_encoder.encode(message))

    def close(self) -> None:
        self._socket.close()
