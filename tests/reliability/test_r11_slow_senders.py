"""R11: clients that send slowly harm only themselves."""

from __future__ import annotations

import asyncio
import re
import shutil
import time

import pytest

from reliability.figures import record
from reliability.wire import Target, ask
from server_process import ServerProcess
from toptwo.api.body import MAX_READ_SECONDS
from toptwo.api.connection import HEAD_SECONDS, REST_SECONDS

NUM_SLOW = 200
ALONE_SECONDS = 10.0
MOST_SLOWER = 2.0
# slowhttptest's attacks, and how long its connections may last. It has no key: what it sends as a body is
# answered at once, and the rest of that body is not waited for.
ATTACKS = {
    "heads in drops": (["-H", "-i", "5"], HEAD_SECONDS),
    "bodies in drops": (["-B", "-i", "2", "-s", "100000"], REST_SECONDS),
    "byte ranges": (["-R", "-a", "1", "-b", "3000"], HEAD_SECONDS),
}
SLACK_SECONDS = 15.0  # for opening all connections, and for slowhttptest's own clock


async def attack(target: Target, options: list[str], most: float) -> float:
    """Seconds until the server had closed all connections."""
    program = shutil.which("slowhttptest")
    assert program, "slowhttptest is needed: apt install slowhttptest"
    url = f"http://127.0.0.1:{target.port}/v1/chat/completions"
    limits = ["-c", str(NUM_SLOW), "-r", "200", "-l", str(int(most + SLACK_SECONDS + 10)), "-p", "5"]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        program, *options, *limits, "-t", "POST", "-u", url, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    plain = re.sub(rb"\x1b\[[\d;]*[A-Za-z]", b"", output).decode()
    assert "No open connections left" in plain, plain[-1500:]
    return time.monotonic() - began


async def drip(target: Target, seconds: list[float]) -> None:
    """A body with a key, a byte at a time, until it is refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    head = target.post("/chat/completions", {}).replace(b"Content-Length: 2", b"Content-Length: 9999")[:-2]
    began = time.monotonic()
    writer.write(head)
    answer = asyncio.create_task(reader.readline())  # bytes on their way to the server may reset the rest
    while not answer.done():
        writer.write(b" ")
        await asyncio.wait([answer], timeout=2)
    assert b" 408 " in answer.result()[:20]
    seconds.append(time.monotonic() - began)
    writer.close()


async def times(target: Target, stop: asyncio.Event) -> list[float]:
    """Seconds of one short request after the other."""
    found = []
    request = target.post("/chat/completions", target.chat("hello", 4))
    while not stop.is_set():
        began = time.monotonic()
        assert (await ask(target.port, request)).status == 200
        found.append(time.monotonic() - began)
        await asyncio.sleep(0.02)
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.timeout(240)
async def test_slow_senders(server: ServerProcess) -> None:
    """Bodies in drops from callers with a key, and all the while one kind of slowness after the other."""
    target = Target.of(server)
    stop = asyncio.Event()
    alone = asyncio.create_task(times(target, stop))
    await asyncio.sleep(ALONE_SECONDS)
    stop.set()
    normal = p99(await alone)
    stop = asyncio.Event()
    beside = asyncio.create_task(times(target, stop))
    bodies: list[float] = []
    dripping = asyncio.gather(*(drip(target, bodies) for _ in range(NUM_SLOW)))
    lasted = {}
    for name, (options, most) in ATTACKS.items():
        lasted[name] = await attack(target, options, most)
        print(f"{name}: {lasted[name]:.0f} s")
        assert lasted[name] <= most + SLACK_SECONDS
    await dripping
    stop.set()
    slow = p99(await beside)
    assert max(bodies) <= MAX_READ_SECONDS + REST_SECONDS + SLACK_SECONDS
    figure = (
        f"p99 of others {slow / normal:.2f} times that without; heads cut after {HEAD_SECONDS:.0f} s, "
        f"bodies after {MAX_READ_SECONDS:.0f} s"
    )
    print(figure)
    assert slow <= MOST_SLOWER * normal, figure
    done = f"slowhttptest -H, -B and -R with {NUM_SLOW} connections each, beside as many bodies in drops"
    record("R11", done, NUM_SLOW * (len(ATTACKS) + 1), 0, figure)
