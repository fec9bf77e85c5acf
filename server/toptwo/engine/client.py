"""The API process's side of waist 1: send a GenerateRequest, iterate its TokenEvents.

Knows messages and sockets; must not know HTTP, text, torch or the scheduler. Delivery never blocks:
events go to a queue per request, and when the engine is lost every open request gets its terminal
error event, as does every later one until there is an engine again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Protocol

from toptwo.engine.transport import ClientSocket
from toptwo.errors import EngineDeadError
from toptwo.messages import (
    AbortRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Hello,
    StatsRequest,
    TokenEvent,
    TokenEvents,
)

_STATS_SECONDS = 1.0  # an engine answers between two steps, and a step may take longer


class Engine(Protocol):
    """What the API needs of an engine; `EngineClient` is the real one, tests have a fake."""

    @property
    def info(self) -> EngineInfo | None:
        """The engine's resolved configuration; None while it loads or after it died."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request, ending with exactly one terminal event.

        Closing the generator early aborts the request. An engine that dies in between yields a
        terminal event with finish_reason "error".

        Raises EngineDeadError at the first iteration when no engine is ready.
        """

    @property
    def num_restarts(self) -> int:
        """How many engines came after the first one."""

    async def stats(self) -> EngineStats | None:
        """What the engine counts: now, or a while ago if it is busy; None when it has not told yet."""


class EngineClient:
    """Talks to one engine process at a time; the supervisor connects it to each new one."""

    def __init__(self) -> None:
        self._socket: ClientSocket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._stats_came = asyncio.Event()
        self._num_connected = 0
        self.num_received = 0  # messages of engines, of whatever kind
        self.ready = asyncio.Event()

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._queues)

    @property
    def num_restarts(self) -> int:
        """See `Engine.num_restarts`."""
        return max(0, self._num_connected - 1)

    async def connect(self, path: Path) -> None:
        """Greet the engine at `path`; `ready` is set when it answers."""
        self._num_connected += 1
        self._socket = ClientSocket(path)
        self._reader = asyncio.create_task(self._read(self._socket), name="engine-reader")
        await self.greet()

    async def greet(self) -> None:
        """Ask for a sign of life: an engine whose loop turns answers between two steps."""
        if self._socket:
            await self._socket.send(Hello())

    async def disconnect(self, reason: str) -> None:
        """Forget the engine and end all open requests with an error."""
        self._info = self._stats = None
        self.ready.clear()
        if self._reader:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._socket:
            self._socket.close()
        self._reader = self._socket = None
        await self.end_all(reason)

    async def end_all(self, reason: str) -> None:
        """End all open requests with an error, in the engine too."""
        for request_id in list(self._queues):
            if self._socket:
                await self._socket.send(AbortRequest(request_id))
            self._deliver(TokenEvent(request_id, [], "error", error=reason))

    async def stats(self) -> EngineStats | None:
        """See `Engine.stats`."""
        if self._socket and self._info:
            self._stats_came.clear()
            await self._socket.send(StatsRequest())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STATS_SECONDS):
                    await self._stats_came.wait()
        return self._stats

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        if self._socket is None or self._info is None:
            raise EngineDeadError("the engine is not ready")
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._queues[request.request_id] = queue
        try:
            await self._socket.send(request)
            while True:
                event = await queue.get()
                yield event
                if event.finish_reason:
                    return
        finally:
            if self._queues.pop(request.request_id, None) is not None and self._socket is not None:
                await self._socket.send(AbortRequest(request.request_id))

    async def _read(self, socket: ClientSocket) -> None:
        while True:
            message = await socket.receive()
            self.num_received += 1
            match message:
                case EngineInfo():
                    self._info = message
                    self.ready.set()
                case EngineStats():
                    self._stats = message
                    self._stats_came.set()
                case TokenEvents():
                    for event in message.events:
                        self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        # A request that was closed meanwhile has no queue any more: its late events are dropped.
        if event.finish_reason:
            queue = self._queues.pop(event.request_id, None)
        else:
            queue = self._queues.get(event.request_id)
        if queue:
            queue.put_nowait(event)
