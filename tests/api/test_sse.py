"""The response that sends a stream, held against clients that do not read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from toptwo.api import sse
from toptwo.api.sse import EventStream

SCOPE = {"type": "http", "method": "POST"}


@dataclass
class Client:
    """reads: how many bodies it takes before it blocks. bodies: those that it was sent."""

    reads: int
    bodies: list[bytes] = field(default_factory=list)

    async def send(self, message: dict[str, object]) -> None:
        if message["type"] != "http.response.body":
            return
        if len(self.bodies) == self.reads:
            await asyncio.Event().wait()
        self.bodies.append(message["body"])  # type: ignore[arg-type]

    async def receive(self) -> dict[str, object]:
        await asyncio.Event().wait()
        raise AssertionError


@dataclass
class Events:
    """An event that comes at once, and then a silence, or more of them."""

    silent: bool
    closed: bool = False

    async def generate(self) -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            if self.silent:
                await asyncio.Event().wait()
            while True:
                yield b"data: 2\n\n"
        finally:
            self.closed = True


@pytest.mark.parametrize("silent", [True, False])
async def test_a_client_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    """Also when there is nothing to send to it but comments."""
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.03)
    events, client = Events(silent), Client(reads=1)
    before = asyncio.all_tasks()
    stream = EventStream(events.generate(), {})
    await asyncio.wait_for(stream(SCOPE, client.receive, client.send), 5)  # type: ignore[arg-type]
    assert client.bodies == [b"data: 1\n\n"]
    assert events.closed
    assert asyncio.all_tasks() == before


async def test_what_the_events_raise_is_raised_and_leaves_nothing_behind() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise RuntimeError

    client, before = Client(reads=10), asyncio.all_tasks()
    with pytest.raises(RuntimeError):
        await EventStream(events(), {})(SCOPE, client.receive, client.send)  # type: ignore[arg-type]
    assert asyncio.all_tasks() == before


async def test_headers_of_the_caller_do_not_undo_those_of_a_stream() -> None:
    headers = EventStream(Events(silent=True).generate(), {"x-toptwo-ignored": "user"}).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
    assert headers["x-toptwo-ignored"] == "user"
    assert "content-length" not in headers
