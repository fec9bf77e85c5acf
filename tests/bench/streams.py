"""How fast the API process streams: the delay of each token, and the chunks that one core can send.

The real server, as `toptwo serve` sets it up but with an engine that computes nothing, in a process of
its own; the clients are plain sockets in this one. Two measurements, each repeated in rounds:

- paced: every stream gets a token at the same moment, as a step of a real engine gives it, so many times a
  second; the delay runs from that moment to the token's arrival at its client.
- saturated: the engine steps again as soon as the last step's tokens are on their way; the chunks are
  counted per second, and per second of the server's CPU time.

Run: make bench-streams            or: python tests/bench/streams.py --streams 256 --rate 20 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import uvicorn
import uvloop
from fastapi import FastAPI

sys.path[:0] = [str(Path(__file__).parents[1])]

from fakes import KEY, FakeGrammars, chat, engine_info, served_model  # noqa: E402
from toptwo.api.connection import BoundedHttp  # noqa: E402
from toptwo.api.health import Lifecycle  # noqa: E402
from toptwo.api.security import KeyRing  # noqa: E402
from toptwo.app import create_app  # noqa: E402
from toptwo.messages import GenerateRequest, TokenEvent  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_SECONDS = 120  # for one round; something is broken when it takes longer
TOKENS_OF_A_CHUNK = re.compile(rb'"delta":\{"content":"([a-z]+)"')


class SteppingEngine:
    """An `Engine` whose steps give every request a token at once; it begins when all have come.

    rate: steps per second, at the multiples of 1 / rate of the monotonic clock; 0 steps without a pause.
    The token of step n is the letter number n, so that a client knows from it when it was due.
    """

    def __init__(self, num_streams: int, rate: float) -> None:
        self.info = engine_info(max_model_len=1 << 20)
        self._num_streams = num_streams
        self._rate = rate
        self._token_ids = [token for (token,) in (served_model().tokenizer.encode([c]) for c in LETTERS)]
        self._queues: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        queue = self._queues[request.request_id] = asyncio.Queue()
        if len(self._queues) == self._num_streams:
            self._stepping = asyncio.create_task(self._step(request.max_tokens))
        while True:
            event = await queue.get()
            yield event
            if event.finish_reason:
                return

    async def _step(self, num_steps: int) -> None:
        step = int(time.monotonic() * self._rate)
        for number in range(num_steps):
            step += 1
            if self._rate:
                await asyncio.sleep(max(0, step / self._rate - time.monotonic()))
            else:
                # One turn of the loop for the reader, one for the writer, one to be sure.
                for _ in range(3):
                    await asyncio.sleep(0)
            token_ids = [self._token_ids[step % len(LETTERS)]]
            reason = "length" if number + 1 == num_steps else None
            for request_id, queue in self._queues.items():
                queue.put_nowait(TokenEvent(request_id, token_ids, reason))
        self._queues.clear()


def config_of(app: FastAPI) -> uvicorn.Config:
    """As `toptwo serve` has it."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=BoundedHttp,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
    )


def serve(num_streams: int, rate: float) -> None:
    """Serve until killed; prints the port."""
    engine = SteppingEngine(num_streams, rate)
    app = create_app(engine, served_model(), FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    uvloop.run(uvicorn.Server(config_of(app)).serve(sockets=[listener]))


class Reader(asyncio.Protocol):
    """One stream: sends the request, and notes when the tokens came. moments: seconds, one per token.

    begun: set when any stream's first token comes.
    """

    def __init__(self, request: bytes, begun: asyncio.Event) -> None:
        self._request = request
        self._begun = begun
        self._rest = b""
        self.tokens = bytearray()
        self.moments: list[float] = []
        self.num_chunks = 0
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        for letters in TOKENS_OF_A_CHUNK.findall(whole):
            self.num_chunks += 1
            self.tokens += letters
            self.moments += [now] * len(letters)
        if self.tokens:
            self._begun.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def delays(self, rate: float) -> list[float]:
        """Seconds from each token's moment to its arrival."""
        letters = [LETTERS.index(chr(token)) for token in self.tokens]
        latest = int(self.moments[0] * rate)
        first = latest - (latest - letters[0]) % len(LETTERS)
        assert all(letter == (first + n) % len(LETTERS) for n, letter in enumerate(letters)), "lost"
        return [moment - (first + n) / rate for n, moment in enumerate(self.moments)]


@dataclass(frozen=True)
class Round:
    """One reading of all streams, from the first token to the last. seconds, cpu_seconds: of the server."""

    readers: list[Reader]
    seconds: float
    cpu_seconds: float


async def read_streams(server: psutil.Process, port: int, num_streams: int, num_tokens: int) -> Round:
    """Ask for all streams at once and read them to their ends."""
    body = json.dumps(chat(stream=True, max_tokens=num_tokens)).encode()
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    begun = asyncio.Event()
    readers = [Reader(request, begun) for _ in range(num_streams)]
    for reader in readers:
        await asyncio.get_running_loop().create_connection(lambda r=reader: r, "127.0.0.1", port)
    async with asyncio.timeout(MOST_SECONDS):
        await begun.wait()
        cpu_seconds = -sum(server.cpu_times()[:2])
        for reader in readers:
            await reader.ended.wait()
    cpu_seconds += sum(server.cpu_times()[:2])
    assert all(len(reader.tokens) == num_tokens for reader in readers), "a stream is not whole"
    began, ended = min(r.moments[0] for r in readers), max(r.moments[-1] for r in readers)
    return Round(readers, ended - began, cpu_seconds)


def measure(num_streams: int, rate: float, num_tokens: int) -> Round:
    """One round against a fresh server."""
    command = [sys.executable, __file__, "--serve", "--streams", str(num_streams), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            return uvloop.run(read_streams(psutil.Process(process.pid), port, num_streams, num_tokens))
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=20, help="tokens per second of each stream, when paced")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help="be the server; --rate 0 does not pause")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.streams, arguments.rate)
        return
    print(f"{arguments.streams} streams of {arguments.tokens} tokens; {os.cpu_count()} cores")
    delays, per_second, per_cpu_second = [], [], []
    for number in range(arguments.rounds):
        paced = measure(arguments.streams, arguments.rate, arguments.tokens)
        cuts = statistics.quantiles(
            [d for reader in paced.readers for d in reader.delays(arguments.rate)], n=1000
        )
        saturated = measure(arguments.streams, 0, arguments.tokens)
        num_chunks = sum(reader.num_chunks for reader in saturated.readers)
        delays.append(cuts[989])
        per_second.append(num_chunks / saturated.seconds)
        per_cpu_second.append(num_chunks / saturated.cpu_seconds)
        print(
            f"round {number + 1}: delay p50 {cuts[499] * 1e3:.1f} ms, p99 {cuts[989] * 1e3:.1f} ms, p99.9"
            f" {cuts[998] * 1e3:.1f} ms, core {paced.cpu_seconds / paced.seconds:.0%} busy; saturated"
            f" {per_second[-1]:,.0f} chunks/s, {per_cpu_second[-1]:,.0f} per CPU second"
        )
    middle = [statistics.median(figures) for figures in (delays, per_second, per_cpu_second)]
    print(
        f"medians: p99 delay {middle[0] * 1e3:.1f} ms; saturated {middle[1]:,.0f} chunks/s,"
        f" {middle[2]:,.0f} per CPU second"
    )


if __name__ == "__main__":
    main()
