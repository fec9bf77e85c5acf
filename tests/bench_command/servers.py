"""Servers to measure: one over our own API with a scripted engine, and one that misbehaves as asked.

Both run in a thread, so that a test can be a whole `toptwo bench` with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn

from fakes import KEY, FakeEngine, FakeGrammars, Script, served_model
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app

NUM_TOKENS = 6
T = TypeVar("T")


class Host:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, from the other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""

        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def chunk(content: str = "", **fields: object) -> bytes:
    """A chunk of a stream, as an event; raw UTF-8, as fast JSON writers leave it."""
    delta = {"content": content} if content else {}
    body = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], **fields}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


FINISH = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"

# What an answer consists of, write by write; None is to wait for ever.
STREAMS: dict[str, list[bytes | None]] = {
    "good": [chunk("one"), chunk(" two"), FINISH + USAGE + DONE],
    "uncounted": [chunk("one"), chunk(" two"), FINISH + DONE],
    "crowded": [chunk("one two"), FINISH + USAGE + DONE],
    "cut": [chunk("one")],
    "short": [chunk("one"), b"0\r\n\r\n"],
    "error-event": [chunk("one"), b'data: {"error": {"message": "out of\\n luck"}}\n\n' + DONE],
    "noise": [b"data: {not json}\n\n" + DONE],
    "not-a-chunk": [b'data: {"choices": [1]}\n\n' + DONE],
    "stuck": [chunk("one"), None],
    "odd": [
        b": keep-alive\r\n\r\n" + chunk("a\u2028b\x85c").replace(b"\n", b"\r\n"),
        chunk("two")[:20],
        chunk("two")[20:],
        b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}], "usage": null}\n\n',
        b"data:\n\ndata:[DONE]\n\n",
    ],
}


@dataclass
class BadServer:
    """Behaves as the first part of the path says: `/cut/v1/chat/completions` cuts its answer.

    flaky: refuses every second request. bodies, headers: of the requests it got.
    """

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def at(self, behaviour: str) -> str:
        """A base URL."""
        return f"{self.url}/{behaviour}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                first, *rest = request.decode().strip().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                _, behaviour, *path = first.split()[1].split("/")
                if path[-1] == "models":
                    self._list_models(writer, behaviour)
                elif path[-1] == "completions":
                    self.bodies.append(json.loads(body))
                    self.headers.append(headers)
                    if not await self._answer(reader, writer, behaviour):
                        return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _list_models(self, writer: asyncio.StreamWriter, behaviour: str) -> None:
        if behaviour == "locked":
            _whole(writer, 401, {"error": {"message": "no key"}})
        elif behaviour == "listless":
            _whole(writer, 404, {"detail": "Not Found"})
        elif behaviour == "ill":
            _whole(writer, 503, {"error": "still\nloading"})
        else:
            _whole(writer, 200, {"data": [{"id": "bad"}, {"id": "worse"}]})

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, behaviour: str
    ) -> bool:
        """Whether the connection is still good for another request."""
        if behaviour == "flaky":
            behaviour = "good" if len(self.bodies) % 2 else "http-429"
        if behaviour.startswith("http-"):
            error = {"message": "ignore_eos is\n not known", "code": None}
            _whole(writer, int(behaviour.removeprefix("http-")), {"error": error})
            return True
        if behaviour == "hang-up":
            return False
        if behaviour == "silent":
            await reader.read()  # until the client leaves
            return False
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for piece in STREAMS.get(behaviour, STREAMS["good"]):
            if piece is None:
                await reader.read()
                return False
            ready = piece.endswith(b"0\r\n\r\n")
            writer.write(piece if ready else b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.005)
        if behaviour == "cut":
            return False
        if behaviour != "short":
            writer.write(b"0\r\n\r\n")
        return True


def _whole(writer: asyncio.StreamWriter, status: int, body: object) -> None:
    content = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)


@dataclass(frozen=True)
class Ours:
    """Our own API over a scripted engine."""

    url: str
    engine: FakeEngine


@contextlib.contextmanager
def our_server(host: Host) -> Iterator[Ours]:
    """Serve it."""
    model = served_model()
    script = Script(token_ids=model.tokenizer.encode(["a" * NUM_TOKENS]), finish="length", pause=0.002)
    engine = FakeEngine(script)
    app = create_app(engine, model, FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    ended = asyncio.run_coroutine_threadsafe(server.serve([listener]), host.loop)
    yield Ours(f"http://127.0.0.1:{listener.getsockname()[1]}/v3/openai", engine)
    server.should_exit = True
    ended.result(10)
