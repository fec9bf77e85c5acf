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
    """reads: how many bodies it takes before it blocks. bodies: those that it was sent. gone: it has left."""

    reads: int
    bodies: list[bytes] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: dict[str, object]) -> None:
        if message["type"] != "http.response.body":
            return
        if len(self.bodies) == self.reads:
            await self.gone.wait()
        if not self.gone.is_set():
            self.bodies.append(message["body"])  # type: ignore[arg-type]

    async def receive(self) -> dict[str, object]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


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
                await asyncio.sleep(0)
                yield b"data: 2\n\n"
        finally:
            self.closed = True


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("reads", [0, 1, 5])
async def test_a_stream_ends_with_its_client(
    monkeypatch: pytest.MonkeyPatch, silent: bool, reads: int
) -> None:
    """Whatever is being sent then: nothing, an event or a comment."""
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    events, client = Events(silent), Client(reads)
    before = asyncio.all_tasks()
    call = EventStream(events.generate(), {})(SCOPE, client.receive, client.send)  # type: ignore[arg-type]
    stream = asyncio.create_task(call)
    await asyncio.sleep(0.1)
    assert not events.closed
    assert len(client.bodies) == reads
    client.gone.set()
    await asyncio.wait_for(stream, 5)
    assert events.closed
    assert asyncio.all_tasks() == before


async def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        await asyncio.sleep(0.1)
        yield sse.DONE

    client = Client(reads=100)
    await EventStream(events(), {})(SCOPE, client.receive, client.send)  # type: ignore[arg-type]
    assert client.bodies[0] == b"data: 1\n\n"
    assert client.bodies[-2:] == [sse.DONE, b""]
    assert set(client.bodies[1:-2]) == {sse.KEEP_ALIVE}


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
