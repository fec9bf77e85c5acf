"""R3: whoever leaves, wherever in its request, gets everything freed that was held for it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from reliability.figures import record
from reliability.footprint import TASK_SWITCH, Watched, used_blocks
from reliability.wire import Target
from server_process import ServerProcess

NUM_VISITS, AT_ONCE = 200, 24
FAULT_SWITCH = Path(__file__).parents[1] / "fault_switch"
STEP_SECONDS = 0.02  # more than which the tiny model's steps never take
MOST_SECONDS = max(0.25, 3 * STEP_SECONDS)  # from leaving to the freed blocks
QUIET_SECONDS = 20.0

# Where in its request a visitor leaves: how long after its last byte was sent, or in the middle of the bytes.
MOMENTS = ("in the head", "in the body", "at once", "early", "late")
MANNERS = ("close", "reset", "half-close")
SHORT, LONG = "hello", "hello world " * 550  # the second one is a prompt of several steps


@dataclass
class Visit:
    """One request that its client gives up. left: when, in seconds since 1970. sequences: of the answer."""

    name: str
    path: str
    body: dict[str, Any]
    moment: str
    manner: str
    sequences: int
    left: float = 0.0

    async def pay(self, target: Target, source: random.Random) -> None:
        head, _, body = target.post(self.path, self.body).partition(b"\r\n\r\n")
        head += b"\r\nx-request-id: " + self.name.encode() + b"\r\n\r\n"
        sent = {"in the head": head[:60], "in the body": head + body[:20]}.get(self.moment, head + body)
        wait = {"at once": 0.0, "late": source.uniform(0.3, 1.5)}.get(self.moment, source.uniform(0, 0.1))
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        reading = asyncio.create_task(reader.read(-1))
        writer.write(sent)
        await asyncio.sleep(wait)
        self.left = time.time()
        if self.manner == "half-close":
            writer.write_eof()
            await asyncio.sleep(0.5)
        elif self.manner == "reset":
            writer.transport.abort()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()


def draw(number: int, target: Target, source: random.Random) -> Visit:
    """A request that would go on for a minute, of any endpoint."""
    text, stream = source.choice((SHORT, LONG)), source.random() < 0.5
    choices = source.choice((1, 1, 3))
    messages = [{"role": "user", "content": text}]
    path, body, sequences = source.choice(
        [
            ("/chat/completions", {"messages": messages, "max_tokens": 500, "n": choices}, choices),
            ("/completions", {"prompt": [text] * choices, "max_tokens": 500, "ignore_eos": True}, choices),
            ("/responses", {"input": text, "max_output_tokens": 500, "store": False}, 1),
            ("/messages", {"messages": messages, "max_tokens": 500}, 1),
        ]
    )
    body = {"model": target.model, "stream": stream, "temperature": 0, **body}
    return Visit(f"r3-{number}", path, body, source.choice(MOMENTS), source.choice(MANNERS), sequences)


async def test_leaving_frees_everything(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Half of the visitors find all slots taken, so they leave from the queue."""
    switches = Watched.switches(tmp_path) | {"FAULTS": f"slow@{STEP_SECONDS * 1000:.0f}*"}
    switches |= {"PYTHONPATH": os.pathsep.join(map(str, (TASK_SWITCH, FAULT_SWITCH)))}
    switches |= {"NEXT_SWITCH": str(FAULT_SWITCH / "sitecustomize.py")}
    server = start("--max-num-seqs", "12", **switches).wait_until_ready()
    target, source = Target.of(server), random.Random(3)
    watched = Watched(server, tmp_path / "tasks")
    await visit(target, [draw(-1 - n, target, source) for n in range(AT_ONCE)], source)  # so that all is warm
    baseline = await watched.quiet_footprint(None)
    visits = [draw(n, target, source) for n in range(NUM_VISITS)]
    await visit(target, visits, source)
    after = await watched.quiet_footprint(baseline.counts)
    seconds = delays(server, visits)
    assert await used_blocks(server, target) == 0
    assert after.counts == baseline.counts
    late = sorted(seconds)[int(0.99 * len(seconds))]
    figure = (
        f"KV freed after {late * 1000:.0f} ms (p99) and {max(seconds) * 1000:.0f} ms (all), in steps of "
        f"{STEP_SECONDS * 1000:.0f} ms; used blocks 0; files, threads, tasks as before"
    )
    print(figure)
    assert late <= MOST_SECONDS, figure
    done = "clients that leave in any phase, way and endpoint"
    record("R3", done, f"{NUM_VISITS} ({len(seconds)} sequences in the engine)", 0, figure)


async def visit(target: Target, visits: list[Visit], source: random.Random) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def pay(one: Visit) -> None:
        async with places:
            await one.pay(target, source)

    await asyncio.gather(*map(pay, visits))


def delays(server: ServerProcess, visits: list[Visit]) -> list[float]:
    """Seconds from leaving to the engine's giving it up, of all sequences that had got there."""
    left = {one.name: one for one in visits}
    found: dict[str, list[float]] = {}
    for line in server.err.splitlines():
        if '"request aborted"' in line:
            event = json.loads(line)
            if event["request_id"] in left:
                at = datetime.fromisoformat(event["timestamp"]).timestamp()
                found.setdefault(event["request_id"], []).append(at - left[event["request_id"]].left)
    for name, times in found.items():
        assert len(times) <= left[name].sequences
    assert len(found) > len(left) / 4, "hardly any had got to the engine"
    return [max(0.0, seconds) for times in found.values() for seconds in times]
