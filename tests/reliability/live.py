"""Servers under test and clients that look closely: what came, when, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx2
import psutil

import tiny
from server_process import ServerProcess

FAULT_SWITCH = Path(__file__).parents[1] / "fault_switch"
MODEL = "tiny-moe"


@cache
def checkpoint() -> Path:
    """A tiny chat model; one for the whole run."""
    directory = Path(mkdtemp(prefix="toptwo-reliability-")) / MODEL
    tiny.write_chat_mixtral(directory)
    return directory


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, faults: str = "") -> Iterator[ServerProcess]:
    """A server of the tiny model that is ready, and gone afterwards. faults: see `injected_faults`."""
    switched = {"PYTHONPATH": str(FAULT_SWITCH), "FAULTS": faults} if faults else {}
    server = ServerProcess(directory, [str(checkpoint()), "--threads", "1", *arguments], switched)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def engine_of(server: ServerProcess) -> psutil.Process:
    """The engine process that runs now."""
    children = psutil.Process(server.process.pid).children()
    (engine,) = [child for child in children if "toptwo.launch_engine" in child.cmdline()]
    return engine


def struck_at(server: ServerProcess) -> float:
    """When the last injected fault struck."""
    return float(re.findall(r"injected \w+ at ([\d.]+)", server.err)[-1])


def client_of(server: ServerProcess) -> httpx2.AsyncClient:
    """A client with as many connections as it likes."""
    headers = {"Authorization": f"Bearer {server.key}"}
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=120, limits=limits)


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A greedy request; the tiny model never ends a greedy answer by itself."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 16, **fields}


@dataclass
class Answer:
    """One request on its way. Times are of `time.monotonic`.

    payloads: what events carried, or the whole answer. last_token, error, ended: when they came.
    """

    wanted: dict[str, Any]
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    payloads: list[dict[str, Any]] = field(default_factory=list)
    status: int = 0
    done: bool = False
    last_token: float = 0.0
    error: float = 0.0
    ended: float = 0.0

    async def follow(self, client: httpx2.AsyncClient) -> Answer:
        """Read it to its end; whatever breaks off raises."""
        async with client.stream("POST", "/chat/completions", json=self.wanted) as response:
            self.status = response.status_code
            self.accepted.set()
            if not self.wanted.get("stream"):
                self.take(await response.aread())
            else:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        self.done = True
                    elif line.startswith("data: "):
                        assert not self.done, "something after [DONE]"
                        self.take(line.removeprefix("data: ").encode())
        self.ended = time.monotonic()
        return self

    def take(self, data: bytes) -> None:
        payload = json.loads(data)
        self.payloads.append(payload)
        if "error" in payload:
            self.error = time.monotonic()
        else:
            self.last_token = time.monotonic()
            self.begun.set()

    @property
    def finish_reasons(self) -> list[str]:
        choices = [choice for payload in self.payloads for choice in payload.get("choices", [])]
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]

    @property
    def text(self) -> str:
        deltas = [c["delta"] for payload in self.payloads for c in payload.get("choices", [])]
        return "".join(delta.get("content") or "" for delta in deltas)


@dataclass
class Readiness:
    """What /health/ready says, asked all the time on connections of its own."""

    server: ServerProcess
    seen: list[tuple[float, int]] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            status = await asyncio.to_thread(self.server.readiness)
            self.seen.append((time.monotonic(), status))
            await asyncio.sleep(0.02)

    def first(self, status: int, since: float) -> float:
        """When it first said so."""
        return next((at for at, seen in self.seen if at >= since and seen == status), float("inf"))

    async def wait_for(self, status: int, since: float, timeout: float = 60.0) -> float:
        async with asyncio.timeout(timeout):
            while self.first(status, since) == float("inf"):
                await asyncio.sleep(0.02)
        return self.first(status, since)


@contextlib.asynccontextmanager
async def watched(server: ServerProcess) -> Any:
    """The readiness of a server while something happens to it."""
    readiness = Readiness(server)
    watching = asyncio.create_task(readiness.watch())
    try:
        yield readiness
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
