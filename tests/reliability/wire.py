"""A client so thin that a thousand of them fit beside the server: bytes out, bytes in, then judged.

Knows HTTP/1.1 as far as our server speaks it, and the events of streamed chat completions; must not know what
a test wants of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from server_process import ServerProcess

Json = dict[str, Any]
LONGEST = 120.0  # seconds that any answer may take; whatever takes longer hangs


@dataclass(frozen=True)
class Target:
    """Where requests go, and who asks."""

    port: int
    key: str
    model: str = "tiny-moe"
    prefix: str = "/v1"

    @classmethod
    def of(cls, server: ServerProcess) -> Target:
        """A server that has created its key."""
        return cls(int(server.root.rpartition(":")[2]), server.key)

    def chat(self, text: str, max_tokens: int, **fields: object) -> Json:
        """A greedy chat request; the tiny model's answers never end before max_tokens."""
        messages = [{"role": "user", "content": text}]
        limits = {"max_tokens": max_tokens, "temperature": 0}
        return {"model": self.model, "messages": messages, **limits, **fields}

    def stream(self, text: str, max_tokens: int, **fields: object) -> Json:
        """The same as a stream, with the counts."""
        return self.chat(text, max_tokens, stream=True, stream_options={"include_usage": True}, **fields)

    def post(self, path: str, body: object, *, close: bool = True) -> bytes:
        """The bytes of a request."""
        payload = json.dumps(body).encode()
        return (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
            f"{'Connection: close' if close else 'X-Kept: alive'}\r\n\r\n"
        ).encode() + payload

    def get(self, path: str) -> bytes:
        """The bytes of a request without a body; the path is the whole one."""
        return (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n"
            "Connection: close\r\n\r\n"
        ).encode()


@dataclass(frozen=True)
class Reply:
    """What came back. status: 0 when not even its line came. whole: the answer ended as HTTP says."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    def json(self) -> Json:
        """The body as JSON."""
        found: Json = json.loads(self.body)
        return found

    @property
    def events(self) -> list[bytes]:
        """The data of the events that came in full; comments are left out."""
        blocks = self.body.split(b"\n\n")[:-1]
        return [block.removeprefix(b"data: ") for block in blocks if not block.startswith(b":")]


class StreamError(AssertionError):
    """A stream broke the rules that hold for every stream, whatever befalls the server."""


@dataclass(frozen=True)
class Streamed:
    """A stream taken apart.

    tokens: with their log-probabilities, where these were asked for. ended: its finish_reason; None for none.
    error: its error event's message; None for none.
    """

    text: str
    tokens: list[tuple[str, float]]
    ended: str | None
    usage: Json | None
    error: str | None
    done: bool

    @property
    def complete(self) -> bool:
        """Whether all came: one finish_reason, one usage, one [DONE]."""
        return self.ended is not None and self.usage is not None and self.done and self.error is None


def take_apart(reply: Reply) -> Streamed:
    """Raises StreamError for what no stream may have: anything twice, after its end, or after an error."""
    text = ""
    tokens: list[tuple[str, float]] = []
    reasons: list[str] = []
    usages: list[Json] = []
    errors: list[str] = []
    events = reply.events
    for event in events:
        if event == b"[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            errors.append(chunk["error"]["message"])
            continue
        if errors:
            raise StreamError("a chunk came after an error event")
        usages += [chunk["usage"]] if chunk.get("usage") else []
        for choice in chunk["choices"]:
            if reasons:
                raise StreamError("text came after finish_reason")
            text += choice["delta"].get("content") or ""
            for token in (choice.get("logprobs") or {}).get("content") or ():
                tokens.append((token["token"], token["logprob"]))
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    if max(len(reasons), len(usages), len(errors)) > 1 or events.count(b"[DONE]") > 1:
        raise StreamError(f"more than one end: {events[-4:]}")
    if b"[DONE]" in events and events[-1] != b"[DONE]":
        raise StreamError("something came after [DONE]")
    done = events[-1:] == [b"[DONE]"]
    return Streamed(text, tokens, _only(reasons), _only(usages), _only(errors), done)


async def ask(
    port: int, request: bytes, *, begun: Callable[[], None] | None = None, seconds: float = LONGEST
) -> Reply:
    """Send the bytes and read until the server closes. begun: called when the answer begins to come.

    A broken or refused connection is a Reply that is not whole. Raises TimeoutError for a hang.
    """
    received = bytearray()
    async with asyncio.timeout(seconds):
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
            try:
                writer.write(request)
                while data := await reader.read(65536):
                    if begun and not received:
                        begun()
                    received += data
            finally:
                writer.close()
    return parse(bytes(received))


def exchange(port: int, data: bytes, *, patience: float = LONGEST, seconds: float = LONGEST) -> bytes:
    """Send the bytes and return what comes until the server closes.

    When nothing comes for `patience` seconds, it is told that nothing more will be sent, which for it is that
    the client has left. Raises TimeoutError when it then does not close within `seconds`.
    """
    received = bytearray()
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), seconds) as line:
        line.sendall(data)
        line.settimeout(patience)
        try:
            while some := line.recv(65536):
                received += some
            return bytes(received)
        except TimeoutError:
            line.shutdown(socket.SHUT_WR)
        line.settimeout(seconds)
        while some := line.recv(65536):
            received += some
    return bytes(received)


async def ask_all(port: int, requests: Iterable[bytes]) -> list[Reply]:
    """All at once."""
    return await asyncio.gather(*(ask(port, request) for request in requests))


async def leave(port: int, request: bytes, after: float, *, reset: bool = False) -> None:
    """Send the bytes and be gone after so many seconds, answered or not."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await asyncio.sleep(after)
        if reset:
            writer.transport.abort()
        writer.close()


def parse(received: bytes) -> Reply:
    """The one answer that these bytes are, or are the beginning of."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    if not separator:
        return Reply(0, {}, b"", False)
    lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    status = int(lines[0].split(" ")[1])
    if headers.get("transfer-encoding") == "chunked":
        body, whole = _unchunk(rest)
    else:
        body, whole = rest, len(rest) == int(headers.get("content-length", "0"))
    return Reply(status, headers, body, whole)


def _unchunk(rest: bytes) -> tuple[bytes, bool]:
    pieces: list[bytes] = []
    at = 0
    while (line_end := rest.find(b"\r\n", at)) >= 0:
        size = int(rest[at:line_end], 16)
        begin, end = line_end + 2, line_end + 2 + size
        if size == 0:
            return b"".join(pieces), rest[begin:] == b"\r\n"
        pieces.append(rest[begin:end])
        if len(rest) < end + 2:
            break
        at = end + 2
    return b"".join(pieces), False


def _only(values: Sequence[Any]) -> Any:
    return values[0] if values else None
