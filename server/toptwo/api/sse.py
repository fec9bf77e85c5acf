"""Server-sent events: an answer's pieces as `data:` lines, kept alive, bounded, and always closed.

Knows the event stream's format and when a stream is torn down; must not know how pieces come about.

The headers leave as soon as the request is accepted, not with the first token: a long prefill must not
look like a dead server, and everything that can be refused has been refused by then. What fails later
is reported in the stream, as an error event and [DONE].
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Protocol

import orjson
import structlog
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from toptwo.api.body import wait_for_disconnect
from toptwo.api.generation import Delta
from toptwo.errors import ApiError, internal_error

log = structlog.get_logger()

PING_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"
# A comment: clients try to parse the data of any event.
KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """A response that sends ready-made events, with comments in between for whoever cuts silent lines.

    Per event it does no more than send it; what needs a clock is done at the pings.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        # Proxies must not keep events back, nor anybody the whole stream.
        as_it_comes = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers={**headers, **as_it_comes}, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; however it ends, the events' generator is closed."""
        sending = asyncio.create_task(self._send_events(send), name="event stream")
        leaving = asyncio.create_task(wait_for_disconnect(receive), name="end of the event stream's client")
        try:
            while not await _any_done(sending, leaving):
                await send(_body(KEEP_ALIVE))  # waits as the events do while the client reads nothing
            if sending.done():
                sending.result()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send(_body(event))


async def _any_done(*tasks: asyncio.Task[None]) -> bool:
    """Wait for one of the tasks, no longer than to the next ping."""
    done, _ = await asyncio.wait(tasks, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class StreamWriter(Protocol):
    """An endpoint's way to write deltas: the data of its events."""

    def opening(self) -> Iterable[bytes]:
        """What comes before the first delta."""

    def chunks(self, delta: Delta) -> Iterable[bytes]:
        """What a delta becomes."""


async def data_events(
    deltas: AsyncGenerator[Delta, None], writer: StreamWriter
) -> AsyncGenerator[bytes, None]:
    """The events of one streamed answer. Failures become an error event; [DONE] is always last.

    What a delta becomes leaves as one piece.
    """
    try:
        async with aclosing(deltas):
            # Not earlier: the first chunk tells a client that the model has begun to answer.
            opening = [*writer.opening()]
            async for delta in deltas:
                yield b"".join(map(_data, [*opening, *writer.chunks(delta)]))
                opening = []
    except ApiError as error:
        yield _data(orjson.dumps(error.body()))
    except Exception:
        log.exception("stream failed")
        yield _data(orjson.dumps(internal_error().body()))
    yield DONE


def _data(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"
