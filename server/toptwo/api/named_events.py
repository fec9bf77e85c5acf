"""Event streams whose events have names, as those of OpenAI's responses and Anthropic's messages.

Knows the event stream's format and how a stream ends; must not know how pieces come about.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Protocol

import orjson
import structlog

from toptwo.api.generation import Delta
from toptwo.errors import ApiError, internal_error

log = structlog.get_logger()


class EventWriter(Protocol):
    """A format's way to write an answer: whole events."""

    def opening(self) -> Iterable[bytes]:
        """What comes at once, before the model has begun."""

    def events(self, delta: Delta) -> Iterable[bytes]:
        """What a delta becomes."""

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The end of an answer that failed."""


def named_event(data: Mapping[str, object]) -> bytes:
    """The event of this data, whose field `type` is the event's name."""
    return b"event: " + str(data["type"]).encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


async def named_events(
    deltas: AsyncGenerator[Delta, None], writer: EventWriter
) -> AsyncGenerator[bytes, None]:
    """The events of one streamed answer; what a delta becomes leaves as one piece."""
    try:
        async with aclosing(deltas):
            yield b"".join(writer.opening())
            async for delta in deltas:
                if events := b"".join(writer.events(delta)):
                    yield events
    except ApiError as error:
        yield b"".join(writer.failure(error))
    except Exception:
        log.exception("stream failed")
        yield b"".join(writer.failure(internal_error()))


async def write_whole(deltas: AsyncGenerator[Delta, None], writer: EventWriter) -> None:
    """Let the writer see all of an answer that is not streamed. Raises ApiError."""
    async with aclosing(deltas):
        async for delta in deltas:
            for _ in writer.events(delta):
                pass
