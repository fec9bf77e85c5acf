"""A client's connection, bounded where there is no request yet, or none any more.

Knows uvicorn's HTTP protocol, bytes and clocks; must not know routes, keys or what a request means.

uvicorn bounds neither the size of a request's head nor the time that it takes, and queues what is sent behind
a request that is still being answered without noticing that its sender leaves. So:

- a head has at most `MAX_HEAD_BYTES` and must be there `HEAD_SECONDS` after it could first have come;
- what surrounds a body (chunk sizes, extensions, trailers) is bounded too, in proportion to the body, so that
  nothing grows in the parser;
- the rest of a body whose request has been answered already may take `REST_SECONDS`;
- there is one request at a time: one that comes too early is dropped, and the connection closed behind the
  answer, after which HTTP has its sender try again (RFC 9112, 9.3.2);
- there are no more connections than the process can have open files.

A body's own bounds are in `body`; that a client takes its answer is watched by the kernel (see `launch`).
"""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from toptwo.errors import ApiError

MAX_HEAD_BYTES = 32 * 1024
HEAD_SECONDS = 20.0
REST_SECONDS = 5.0
SPARE_FILES = 128  # for all but connections: the engine's socket, checkpoints, logs
_BYTES_AROUND_BODY_BYTE = 16  # a chunk of one byte has five, and may have zeros before its size


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with the bounds above; its `data_received` and the rest are uvicorn's."""

    _deadline: asyncio.TimerHandle | None = None
    _reading = True  # from when a request could come to its last byte
    _deaf = False  # whatever comes is dropped
    _allowance = MAX_HEAD_BYTES  # how many bytes may come that are no body
    _refusal = ApiError("This is not a valid HTTP request.")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, unless there are too many connections."""
        super().connection_made(transport)
        self._allow(HEAD_SECONDS)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES:
            self._refuse(_too_many_connections())

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing will come any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand the bytes to the parser, within bounds."""
        if self._deaf:
            return
        if not self._reading and self.cycle.response_complete:
            self._reading = True
            self._allow(HEAD_SECONDS)
        self._allowance -= len(data)
        super().data_received(data)
        if self._allowance < 0 and not self._deaf and not self.transport.is_closing():
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._deaf = True
            self.cycle.keep_alive = False
            raise _TooEarlyError
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request's head is there."""
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise _TooLargeError
        self._stop_clock()
        super().on_headers_complete()
        self.headers = []  # the request has its own; trailers, which the parser gives as headers, are dropped

    def on_body(self, body: bytes) -> None:
        """Some of a request's body is there."""
        earned = len(body) * (1 + _BYTES_AROUND_BODY_BYTE)
        self._allowance = min(self._allowance + earned, MAX_HEAD_BYTES)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is there, its body included."""
        super().on_message_complete()
        self._reading, self._allowance = False, MAX_HEAD_BYTES
        if self.cycle.response_complete:
            self._allow(self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        """A request has been answered, maybe before all of it was there."""
        super().on_response_complete()
        if self._reading:
            self._allow(REST_SECONDS)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what its parser does not take; here in OpenAI's envelope."""
        if not self._deaf:
            self._refuse(self._refusal)

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and close the connection when the client has seen it, or soon."""
        self._deaf = True
        self._stop_clock()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:  # in the middle of an answer it would be taken for part of it
                self.transport.abort()
                return
            self.cycle.disconnected = True  # whoever waits for the rest of its body
            self.cycle.message_event.set()
        self.transport.write(_as_http(error))
        # Closed at once, with bytes that nobody has read, it would be reset, and the answer be lost.
        self.transport.write_eof()
        self._allow(REST_SECONDS)

    def _allow(self, seconds: float) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _TooEarlyError(Exception):
    """Stops the parser: a request behind one that has not been answered."""


class _TooLargeError(Exception):
    """Stops the parser: a head over its bound."""


def _too_large() -> ApiError:
    return ApiError(
        f"The request's head, or what surrounds its body, is over {MAX_HEAD_BYTES} bytes.", status=431
    )


def _too_many_connections() -> ApiError:
    headers = {"Retry-After": "5"}
    message = "The server has as many connections as it can. Try again in 5 s."
    return ApiError(message, status=503, kind="server_error", code="overloaded", headers=headers)


def _as_http(error: ApiError) -> bytes:
    body = orjson.dumps(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
