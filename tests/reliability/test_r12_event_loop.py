"""R12: the event loop is never blocked, whatever a caller sends while others stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from reliability.figures import record
from reliability.wire import Target, ask
from server_process import ServerProcess
from toptwo.api.body import MAX_BODY_BYTES

LAG_SWITCH = Path(__file__).parent / "lag_switch"
NUM_STREAMS = 8
MOST_LAG_P99, MOST_LAG = 0.05, 0.25  # seconds
MOST_SLOWER = 2.0
MOST_GAP = 0.5  # seconds between two tokens of a stream while others' grammars are compiled
SLOW_STEPS = "slow@20*"  # milliseconds: a step that is short against what is looked for, and steady
FAULT_SWITCH = Path(__file__).parents[1] / "fault_switch"
FULL = MAX_BODY_BYTES - 4096  # bytes of text that fit into a body


def messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def tool(number: int, properties: int, description: int) -> dict[str, Any]:
    fields = {f"field_{n}": {"type": "string", "description": "what it is"} for n in range(properties)}
    parameters = {"type": "object", "properties": fields}
    function = {"name": f"tool_{number}", "description": "x " * (description // 2), "parameters": parameters}
    return {"type": "function", "function": function}


CHOICE: dict[str, Any] = {"enum": [f"value {m}" for m in range(8)]}


def schema(properties: int, kind: dict[str, Any] = CHOICE) -> dict[str, Any]:
    fields = {f"field_{n}": kind for n in range(properties)}
    wanted = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}


WORDS = "hello world " * (FULL // 12)
LOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "a text of 8 MB": ("/chat/completions", {"messages": messages(WORDS)}),
    "10,000 messages": ("/chat/completions", {"messages": messages("hello world " * 60) * 10_000}),
    "100,000 messages": ("/chat/completions", {"messages": messages("hello") * 100_000}),
    "128 tools of 60 KB": (
        "/chat/completions",
        {"messages": messages("hello"), "tools": [tool(n, 400, 30_000) for n in range(128)], "max_tokens": 1},
    ),
    "a tool of 6 MB": (
        "/chat/completions",
        {"messages": messages("hello"), "tools": [tool(0, 90_000, 30_000)], "max_tokens": 1},
    ),
    "a schema of 2,000 fields": (
        "/chat/completions",
        {"messages": messages("hello"), "response_format": schema(2_000), "max_tokens": 1},
    ),
    "a schema of 6 MB": (
        "/chat/completions",
        {"messages": messages("hello"), "response_format": schema(50_000), "max_tokens": 1},
    ),
    "8 MB of tokens to go on with": ("/completions", {"prompt": [7] * (FULL // 3), "max_tokens": 1}),
    "a response to 8 MB": ("/responses", {"input": WORDS}),
    "a message of 8 MB": ("/messages", {"messages": messages(WORDS), "max_tokens": 1}),
    "8 MB to tokenize": ("/tokenize", {"prompt": WORDS}),
    "8 MB of tokens": ("/detokenize", {"tokens": [77] * (FULL // 4)}),
    "8 MB of an unknown field": (
        "/chat/completions",
        {"messages": messages("hello"), "x": [1] * (FULL // 3)},
    ),
    "8 MB of nothing": (
        "/chat/completions",
        {"messages": messages("hello"), "metadata": [{}] * (FULL // 4), "max_tokens": 1},
    ),
}


async def stream_until(target: Target, stop: asyncio.Event, moments: list[float]) -> None:
    """A stream and the moments of its pieces, and another, until it is to stop."""
    request = target.post("/chat/completions", target.stream("hello", 4000), close=False)
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=1 << 20)
    try:
        while not stop.is_set():
            writer.write(request)
            data = b""
            while not stop.is_set() and not data.endswith(b"0\r\n\r\n"):
                data = await reader.read(65536)
                assert data, "the stream was cut"
                moments.append(time.monotonic())
    finally:
        writer.close()


def share(values: list[float], part: float) -> float:
    """The value that this part of them does not exceed."""
    return sorted(values)[int(part * len(values))] if values else 0.0


@dataclass
class Watch:
    """The server's event loop and the streams, over the time of one load. All in seconds.

    lags: how much too late a short sleep in the loop ended. gaps: between the pieces of one stream.
    """

    lags: list[float]
    gaps: list[float]

    def __str__(self) -> str:
        lag = f"lag p99 {share(self.lags, 0.99) * 1e3:.0f} ms, max {max(self.lags, default=0.0) * 1e3:.0f} ms"
        return f"{lag}; gap median {self.gap * 1e3:.0f} ms, p99 {share(self.gaps, 0.99) * 1e3:.0f} ms"

    @property
    def gap(self) -> float:
        """The median: what a step takes, but for what the load takes from the cores."""
        return share(self.gaps, 0.5)


@dataclass(frozen=True)
class Streaming:
    """A server with streams on it."""

    target: Target
    lag_file: Path
    moments: list[list[float]]

    async def watch(self, work: Coroutine[Any, Any, Any]) -> Watch:
        """Do the work, and half a second of nothing, and see what others noticed of it."""
        began = time.monotonic()
        await work
        await asyncio.sleep(0.5)
        lines = [line.split() for line in self.lag_file.read_text().splitlines()[:-1]]
        lags = [float(lag) for at, lag in lines if float(at) >= began]
        gaps = [b - a for times in self.moments for a, b in pairwise(times) if b >= began]
        return Watch(lags, gaps)


@contextlib.asynccontextmanager
async def streaming(server: ServerProcess, lag_file: Path) -> AsyncIterator[Streaming]:
    target = Target.of(server.wait_until_ready())
    stop, moments = asyncio.Event(), [list[float]() for _ in range(NUM_STREAMS)]
    streams = [asyncio.create_task(stream_until(target, stop, own)) for own in moments]
    try:
        await asyncio.sleep(1)
        yield Streaming(target, lag_file, moments)
    finally:
        stop.set()
        await asyncio.gather(*streams)


@pytest.mark.timeout(400)
async def test_nobody_waits_for_the_largest_requests(
    start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    switches = {"PYTHONPATH": os.pathsep.join(map(str, (LAG_SWITCH, FAULT_SWITCH))), "FAULTS": SLOW_STEPS}
    switches |= {"NEXT_SWITCH": str(FAULT_SWITCH / "sitecustomize.py")}
    server = start(LAG_FILE=str(tmp_path / "lags"), **switches)
    lags: list[float] = []
    gaps: list[float] = []
    async with streaming(server, tmp_path / "lags") as site:
        alone = await site.watch(asyncio.sleep(2))
        print(f"\n{'nothing':28} {alone}")
        for name, (path, body) in LOADS.items():
            request = site.target.post(path, {"model": site.target.model, **body})
            began = time.monotonic()
            watch = await site.watch(ask(site.target.port, request))
            print(f"{name:28} {watch}; {time.monotonic() - began:.1f} s", flush=True)
            lags += watch.lags
            gaps += watch.gaps
    slower = share(gaps, 0.5) / alone.gap
    figure = (
        f"lag p99 {share(lags, 0.99) * 1e3:.0f} ms, longest {max(lags) * 1e3:.0f} ms; "
        f"a token every {share(gaps, 0.5) * 1e3:.0f} ms instead of {alone.gap * 1e3:.0f}"
    )
    assert share(lags, 0.99) <= MOST_LAG_P99, figure
    assert max(lags) <= MOST_LAG, figure
    assert slower <= MOST_SLOWER, figure
    record("R12", f"the largest requests of each kind, beside {NUM_STREAMS} streams", len(LOADS), 0, figure)


async def test_no_stream_waits_for_a_grammar(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start(PYTHONPATH=str(LAG_SWITCH), LAG_FILE=str(tmp_path / "lags"))
    kinds = [{"type": "string", "format": "date-time", "minLength": length} for length in range(1, 6)]
    formats = [schema(2_000), *(schema(1_000, kind) for kind in kinds)]
    body = {
        "messages": messages("hello"),
        "max_tokens": 1,
        "model": Target.of(server.wait_until_ready()).model,
    }
    async with streaming(server, tmp_path / "lags") as site:
        requests = [site.target.post("/chat/completions", {**body, "response_format": f}) for f in formats]

        async def ask_all() -> None:
            replies = await asyncio.gather(*(ask(site.target.port, request) for request in requests))
            assert {reply.status for reply in replies} == {200}, [reply.body for reply in replies]

        began = time.monotonic()
        watch = await site.watch(ask_all())
        seconds = time.monotonic() - began
    figure = f"{seconds:.1f} s for all; longest gap between two tokens {max(watch.gaps) * 1e3:.0f} ms"
    print(f"\n{watch}; {figure}")
    assert max(watch.gaps) <= MOST_GAP, figure
    done = f"schemas of 1,000 and 2,000 fields, beside {NUM_STREAMS} streams"
    record("R12", done, len(formats), 0, figure)
