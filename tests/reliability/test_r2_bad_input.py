"""R2: ten thousand bad requests get no 5xx, hang nothing, restart nothing, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from clients.environments import Client, install, is_installed
from reliability.bad_input import bad_requests, garbage
from reliability.figures import record
from reliability.live import engine_of
from reliability.wire import Target, ask, exchange, parse
from server_process import ServerProcess

NUM_MUTATED, NUM_THROWN = 6_400, 3_200
WARM_UP = 3  # so many times fewer go before, until memory has the shape that such requests give it
DOCUMENT_SECONDS = 45.0
LEAST_REQUESTS = 10_000
MOST_GROWTH = 1.05
NUM_CONNECTIONS = 32
PATIENCE = 2.0  # seconds; a server that waits for the rest of a request so long is told that none comes
HANG_SECONDS = 10.0
SCHEMATHESIS = Client("schemathesis", "schemathesis")


@dataclass
class Fuzzed:
    """A server, what it was at first, and what it answered so far, by kind of request and status."""

    server: ServerProcess
    target: Target
    engine: int
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    def resident(self) -> tuple[float, float]:
        """MB of API and engine."""
        api, engine = psutil.Process(self.server.process.pid), engine_of(self.server)
        return api.memory_info().rss / 1e6, engine.memory_info().rss / 1e6

    def good_answer(self) -> bytes:
        """What one good request gets, without what differs from time to time."""
        body = self.target.chat("hello world", 32, logprobs=True)
        reply = parse(exchange(self.target.port, self.target.post("/chat/completions", body)))
        assert reply.status == 200
        return json.dumps(reply.json()["choices"]).encode()

    def take(self, kind: str, sent: bytes, received: bytes) -> None:
        """Judge what came back. Nothing at all is an answer too, when what was sent was no request."""
        for status in map(int, re.findall(rb"(?:^|\r\n\r\n|[}\n])HTTP/1\.1 (\d{3}) ", received)) or [0]:
            # Embeddings are answered with 501 by design, and are not asked for here.
            assert status < 500, (status, sent[:2000], received[:2000])
            self.answers[kind, status] += 1
        if not received:
            self.answers[kind, 0] += 1

    def check_alive(self) -> None:
        """No process was lost or restarted, and no exception logged."""
        assert self.server.process.poll() is None
        assert engine_of(self.server).pid == self.engine
        assert "Traceback" not in self.server.err


@pytest.fixture(scope="module")
def fuzzed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    arguments = [str(checkpoint), "--threads", "1", "--max-model-len", "192"]
    server = ServerProcess(tmp_path_factory.mktemp("fuzzed"), arguments)
    try:
        target = Target.of(server.wait_until_ready())
        yield Fuzzed(server, target, engine_of(server).pid)
    finally:
        server.kill()


@pytest.mark.timeout(900)
def test_bad_input_is_refused_and_harms_nothing(fuzzed: Fuzzed) -> None:
    good = fuzzed.good_answer()
    attack(fuzzed, WARM_UP)
    fuzzed.answers.clear()
    before = fuzzed.resident()
    number = attack(fuzzed, 1)
    fuzzed.check_alive()
    assert fuzzed.good_answer() == good
    growth = [now / then for now, then in zip(fuzzed.resident(), before, strict=True)]
    refused = sum(count for (_, status), count in fuzzed.answers.items() if status not in (100, 200))
    assert number >= LEAST_REQUESTS
    assert refused > 0.8 * sum(fuzzed.answers.values())  # most were as bad as they were meant to be
    print(sorted(fuzzed.answers.items()))
    assert max(growth) <= MOST_GROWTH, (before, growth)
    figure = (
        f"no 5xx, none hung, no restart; one good request byte for byte the same before and after; memory "
        f"{100 * (growth[0] - 1):+.1f} % (API) and {100 * (growth[1] - 1):+.1f} % (engine)"
    )
    done = "bad requests by schemathesis, Hypothesis and random bytes"
    record("R2", done, number, 0, figure)


def attack(fuzzed: Fuzzed, divisor: int) -> int:
    """All three kinds, so many times fewer; returns how many requests they were."""
    send_all(fuzzed, "mutated", mutated(fuzzed.target, NUM_MUTATED // divisor))
    send_all(fuzzed, "thrown", thrown(fuzzed.target, NUM_THROWN // divisor))
    return (NUM_MUTATED + NUM_THROWN) // divisor + follow_the_document(fuzzed, DOCUMENT_SECONDS / divisor)


def mutated(target: Target, number: int) -> list[bytes]:
    """Good requests, harmed."""
    made: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=number, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(bad_requests(target))
    def keep(request: bytes) -> None:
        made.append(request)

    keep()
    return made


def thrown(target: Target, number: int) -> list[bytes]:
    """Bytes that are hardly a request."""
    source = random.Random(number)
    return [garbage(target, source) for _ in range(number)]


def send_all(fuzzed: Fuzzed, kind: str, requests: list[bytes]) -> None:
    """On many connections at once: some wait until it is clear that nothing more comes."""

    def send(data: bytes) -> bytes:
        try:
            return exchange(fuzzed.target.port, data, patience=PATIENCE, seconds=HANG_SECONDS)
        except TimeoutError:
            raise AssertionError(("it hangs", data[:2000])) from None

    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        for sent, received in zip(requests, threads.map(send, requests), strict=True):
            fuzzed.take(kind, sent, received)


def follow_the_document(fuzzed: Fuzzed, seconds: float) -> int:
    """Requests that schemathesis makes of the OpenAPI document; returns how many."""
    if not is_installed(SCHEMATHESIS):
        install(SCHEMATHESIS, os.environ)
    done = subprocess.run(
        [
            str(SCHEMATHESIS.python.with_name("schemathesis")), "run", f"{fuzzed.server.root}/openapi.json",
            "--header", f"Authorization: Bearer {fuzzed.target.key}", "--checks", "not_a_server_error",
            "--max-examples", "400", "--max-time", str(round(seconds)), "--mode", "negative",
            "--phases", "coverage,fuzzing", "--no-color", "--request-timeout", "30",
            "--generation-database", "none",
            "--exclude-path-regex", "embeddings$",  # it answers 501 by design
        ],
        cwd=SCHEMATHESIS.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + 90,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"([\d,]+) generated", done.stdout)
    assert found, done.stdout[-2000:]
    return int(found[1].replace(",", ""))


async def test_health_is_answered_while_bad_input_comes(fuzzed: Fuzzed) -> None:
    requests = thrown(fuzzed.target, 200)
    throwing = asyncio.create_task(asyncio.to_thread(send_all, fuzzed, "thrown", requests))
    while not throwing.done():
        assert (await ask(fuzzed.target.port, fuzzed.target.get("/health/ready"), seconds=5)).status == 200
    await throwing
    fuzzed.check_alive()
