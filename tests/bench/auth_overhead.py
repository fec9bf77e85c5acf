"""What accounts add to a request: who it is, what its limits are, and its reservation on the disk.

The real server, as `toptwo serve` sets it up but with an engine that answers at once, in a process of its
own; requests come at a fixed rate, whether or not earlier ones have been answered. Rounds with a key from the
settings, which has no account, and rounds with an account's key take turns. The server's own clock says what
is spent on each part; the clients' clock says what is left of it in whole requests.

Run: make bench-auth            or: python tests/bench/auth_overhead.py --rate 500 --seconds 10 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

sys.path[:0] = [str(Path(__file__).parents[1])]

from streams import config_of  # noqa: E402

from fakes import KEY, FakeEngine, FakeGrammars, Script, chat, served_model  # noqa: E402
from toptwo.accounts import key_store, store  # noqa: E402
from toptwo.accounts.audit import Actor  # noqa: E402
from toptwo.accounts.book import AccountBook  # noqa: E402
from toptwo.accounts.caller import Limits  # noqa: E402
from toptwo.accounts.database import Database, create_directory, open_engine  # noqa: E402
from toptwo.accounts.key_store import KeyRequest  # noqa: E402
from toptwo.accounts.migrations import migrate  # noqa: E402
from toptwo.accounts.money import Price  # noqa: E402
from toptwo.accounts.store import NewAccount  # noqa: E402
from toptwo.api.admission import AdmissionLimits  # noqa: E402
from toptwo.api.billing import Tab  # noqa: E402
from toptwo.api.health import Lifecycle  # noqa: E402
from toptwo.api.security import Credentials, KeyRing  # noqa: E402
from toptwo.app import AppOptions, create_app  # noqa: E402
from toptwo.telemetry.logs import configure_logging  # noqa: E402

PARTS = ("who it is", "limits", "reservation")
TIMES = "times.json"
WARM_UP_SECONDS = 1.0
MOST_CONNECTIONS = 4096
PRICE = Price(100_000, 10_000, 300_000)  # so that every request is charged
MANY = 1 << 40


class EndlessEngine(FakeEngine):
    """One that keeps nothing of what it has answered."""

    async def generate(self, request: Any) -> Any:
        """See `Engine.generate`."""
        async for event in super().generate(request):
            yield event
        self.requests.clear()


def timed(times: list[float], method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The same method, which notes how many seconds it took."""

    @wraps(method)
    async def measured(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return await method(*arguments, **options)
        finally:
            times.append(time.perf_counter() - began)

    return measured


def timed_at_once(times: list[float], method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a method that waits for nothing."""

    @wraps(method)
    def measured(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            times.append(time.perf_counter() - began)

    return measured


def serve(directory: str) -> None:
    """Serve until SIGTERM; prints port and key at first, and writes the seconds of all parts at the end."""
    configure_logging("warning", quoting=False)
    url = f"sqlite:///{directory}/accounts.db"
    create_directory(url)
    engine = open_engine(url)
    migrate(engine)
    database = Database(engine)
    me, limits = Actor("a benchmark"), Limits(requests_per_minute=MANY, tokens_per_minute=MANY)
    account = database.write(
        lambda c: store.create_account(c, me, NewAccount("b", grant=MANY, limits=limits), 0)
    ).result()
    wanted = KeyRequest("k", account.id, limits=limits)
    _, key = database.write(lambda c: key_store.create_key(c, me, wanted, 0)).result()
    database.write(lambda c: store.set_price(c, me, served_model().name, PRICE, 0)).result()

    times: dict[str, list[float]] = {part: [] for part in PARTS}
    Credentials.identify = timed(times["who it is"], Credentials.identify)  # type: ignore[method-assign,assignment]
    Tab.take_request = timed_at_once(times["limits"], Tab.take_request)  # type: ignore[method-assign]
    AccountBook.reserve = timed(times["reservation"], AccountBook.reserve)  # type: ignore[method-assign,assignment]
    book = AccountBook(database)
    options = AppOptions(limits=AdmissionLimits(4096, 4096, None), book=book)
    app = create_app(
        EndlessEngine(Script(token_ids=[65])),
        served_model(),
        FakeGrammars(),
        KeyRing.from_keys([KEY]),
        Lifecycle(),
        options,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(json.dumps({"port": listener.getsockname()[1], "key": key.text}), flush=True)
    server = uvicorn.Server(config_of(app))
    server.capture_signals = lambda: _ending(server)  # type: ignore[method-assign,assignment]
    uvloop.run(server.serve(sockets=[listener]))
    book.close()
    (Path(directory) / TIMES).write_text(json.dumps(times))


class _ending:  # noqa: N801  (a context manager)
    """SIGTERM ends the server, and not the process."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self._server, "should_exit", True))

    def __exit__(self, *_: object) -> None:
        pass


@dataclass
class Line(asyncio.Protocol):
    """One connection: a request at a time, kept open between them."""

    free: list[Line]
    latencies: list[float] = field(default_factory=list)
    _due: float = 0.0
    _rest: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.free:  # it was not needed for so long that the server hung up
            self.free.remove(self)

    def send(self, request: bytes, due: float) -> None:
        """due: the moment that it should have been sent, from which its time is counted."""
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        head, found, body = self._rest.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            if b" 200 " not in head[:20]:
                sys.exit(self._rest.decode())
            self.latencies.append(time.perf_counter() - self._due)
            self._rest = b""
            self.free.append(self)


async def load(port: int, key: str, rate: float, seconds: float) -> list[float]:
    """Seconds of every request after the warm-up, from when it was due to its answer's last byte."""
    body = json.dumps(chat(max_tokens=1)).encode()
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    free: list[Line] = []
    lines: list[Line] = []
    loop = asyncio.get_running_loop()

    async def connect() -> Line:
        assert len(lines) < MOST_CONNECTIONS, "the server does not keep up with the rate"
        _, line = await loop.create_connection(lambda: Line(free), "127.0.0.1", port)
        lines.append(line)
        return line

    free += [await connect() for _ in range(16)]
    began = time.perf_counter()
    for number in range(int(rate * (seconds + WARM_UP_SECONDS))):
        due = began + number / rate
        if number == int(rate * WARM_UP_SECONDS):
            for line in lines:
                line.latencies.clear()
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        (free.pop() if free else await connect()).send(request, due)
    async with asyncio.timeout(30):
        while sum(len(line.latencies) for line in lines) < int(rate * seconds):
            await asyncio.sleep(0.01)
    for line in lines:
        line._transport.close()
    return [latency for line in lines for latency in line.latencies]


@dataclass(frozen=True)
class Round:
    """Seconds: of whole requests, by the clients' clock, and of the parts, by the server's."""

    latencies: list[float]
    parts: dict[str, list[float]]


def measure(rate: float, seconds: float, directory: str, *, with_account: bool) -> Round:
    """One round against a fresh server."""
    command = [sys.executable, __file__, "--serve", directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            told = json.loads(process.stdout.readline())
            key = told["key"] if with_account else KEY
            latencies = uvloop.run(load(told["port"], key, rate, seconds))
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            parts = json.loads((Path(directory) / TIMES).read_text())
            skipped = int(rate * WARM_UP_SECONDS)
            return Round(latencies, {name: times[skipped:] for name, times in parts.items()})
        finally:
            process.kill()


def p50_p99(seconds: list[float]) -> tuple[float, float]:
    """In milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


def sync_milliseconds(directory: str) -> float:
    """How long this disk takes to make a small write last: the median, which bounds every reservation."""
    path = Path(directory) / "probe"
    times = []
    with path.open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, default=500, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10, help="of each round, after a second to warm up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the database is to lie; a temporary one by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(f"{arguments.rate:g} requests/s; {os.cpu_count()} cores; a sync of this disk takes", end=" ")
        print(f"{sync_milliseconds(directory):.2f} ms", flush=True)
        for number in range(arguments.rounds):
            for name, with_account in (("key from the settings", False), ("key of an account", True)):
                place = Path(directory) / f"{number}-{with_account}"
                place.mkdir()
                done = measure(arguments.rate, arguments.seconds, str(place), with_account=with_account)
                figures.setdefault(f"whole request, {name}", []).append(p50_p99(done.latencies))
                if with_account:
                    for part, times in done.parts.items():
                        figures.setdefault(part, []).append(p50_p99(times))
            print(f"round {number + 1} of {arguments.rounds} done", flush=True)
    print(f"\n{'milliseconds, medians of rounds':<40}{'p50':>8}{'p99':>8}")
    for name, rounds in figures.items():
        p50, p99 = (statistics.median(each) for each in zip(*rounds, strict=True))
        print(f"{name:<40}{p50:>8.3f}{p99:>8.3f}")


if __name__ == "__main__":
    main()
