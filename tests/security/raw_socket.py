"""Bytes to a server and back, without a client library that would be too polite to send them."""

from __future__ import annotations

import http.client
import re
import socket
from urllib.parse import urlsplit

from server_process import ServerProcess

SECONDS = 10.0

ALICE, MALLORY = "sk-alice-canary-5151", "sk-mallory-canary-7272"
"""The keys of the server's two callers; neither may be found anywhere but in their requests."""


def address(server: ServerProcess) -> tuple[str, int]:
    """Where the server listens."""
    parts = urlsplit(server.url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def exchange(server: ServerProcess, data: bytes) -> bytes:
    """Everything that is answered until the server closes, or falls silent for a second."""
    answer = b""
    with socket.create_connection(address(server), SECONDS) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(1.0)
            while chunk := connection.recv(1 << 16):
                answer += chunk
        except (TimeoutError, ConnectionError):
            pass
    return answer


def statuses(answer: bytes) -> list[int]:
    """The status of every answer on a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


class Caller:
    """One connection without a key, on which any method, path and Host header can be sent."""

    def __init__(self, server: ServerProcess) -> None:
        self._connection = http.client.HTTPConnection(*address(server), timeout=SECONDS)

    def status(self, method: str, path: str, host: str = "test", **headers: str) -> int:
        """The answer's status. A server that refuses the bytes themselves may close, so it is opened anew."""
        self._connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": host, "Content-Length": "2", **headers}.items():
            self._connection.putheader(name, value.encode("latin-1"))
        self._connection.endheaders(b"{}")
        with self._connection.getresponse() as response:
            response.read()
            return response.status

    def close(self) -> None:
        self._connection.close()
