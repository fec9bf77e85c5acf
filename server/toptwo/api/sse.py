"""Server-sent events: an answer's pieces as `data:` lines, kept alive, bounded, and always closed.

Knows the event stream's format and when a stream is torn down; must not know how pieces come about.

The headers leave as soon as the request is accepted, not with the first token: a long prefill must not
look like a dead server, and everything that can be refused has been refused by then. What fails later
is reported in the stream, as an error event and [DONE].
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Protocol

import orjson
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Receive, Scope, Send

from toptwo.api.generation import Delta
from toptwo.errors import ApiError, internal_error

log = structlog.get_logger()

PING_SECONDS = 15.0
SEND_SECONDS = 60.0  # a client that reads nothing for so long is given up
DONE = b"data: [DONE]\n\n"

# By default the library cuts every live stream when the server is told to stop. Ours end by
# themselves, within the drain time that the server grants.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


class EventStream(EventSourceResponse):
    """A response that sends ready-made events, with comments while there is nothing to send."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(
            events,
            headers=headers,
            media_type="text/event-stream",
            ping=PING_SECONDS,
            # Keep-alives must be comments: clients try to parse the data of any event.
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            send_timeout=SEND_SECONDS,
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; however it ends, the events' generator is closed."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("client stopped reading its stream; the connection is given up")
        finally:
            await self._events.aclose()


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
