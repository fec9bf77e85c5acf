"""R9: memory, files, threads and tasks stay what they are over ten thousand requests of all kinds."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from reliability.figures import record
from reliability.footprint import Footprint, Watched, slope, used_blocks
from reliability.mixture import draw
from reliability.wire import Target, ask, leave
from server_process import ServerProcess

NUM_WARM_UP, NUM_REQUESTS, ROUND = 500, 10_000, 500
AT_ONCE = 16
ABORTED = 0.1  # share of requests whose client leaves, and half of these by a reset
MOST_SLOPE = 0.5  # MB per thousand requests
NUM_LONG, MOST_KEPT, MOST_SECONDS = 4, 150, 1.0  # texts one after the other, MB, seconds of processor time


@pytest.mark.timeout(600)
async def test_memory_is_flat(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start("--max-model-len", "1024", "--log-level", "info", **Watched.switches(tmp_path))
    target = Target.of(server.wait_until_ready())
    watched = Watched(server, tmp_path / "tasks")
    source = random.Random(9)
    await send(target, source, NUM_WARM_UP)
    baseline = await watched.quiet_footprint(None)
    prints = [baseline]
    outcomes: Counter[str] = Counter()
    for _ in range(NUM_REQUESTS // ROUND):
        outcomes += await send(target, source, ROUND)
        prints.append(await watched.quiet_footprint(baseline.counts))
    assert sum(outcomes.values()) == NUM_REQUESTS
    assert outcomes["left"] + outcomes["200"] == NUM_REQUESTS, outcomes
    assert prints[-1].counts == baseline.counts
    assert await used_blocks(server, target) == 0
    slopes = growth(prints)
    figure = (
        f"{slopes[0]:+.2f} MB (API) and {slopes[1]:+.2f} MB (engine) per 1,000; "
        f"{baseline.files[0]} files, {baseline.threads[0]} threads, {baseline.tasks} tasks before and after; "
        "KV blocks used 0"
    )
    print(figure, [round(one.memory[0]) for one in prints], [round(one.memory[1]) for one in prints])
    assert max(slopes) <= MOST_SLOPE, figure
    record("R9", "mixed requests, one in ten aborted", NUM_REQUESTS, 0, figure)


@pytest.mark.timeout(300)
async def test_texts_far_longer_than_the_context(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start("--max-model-len", "8192", **Watched.switches(tmp_path))
    target = Target.of(server.wait_until_ready())
    watched, api = Watched(server, tmp_path / "tasks"), psutil.Process(server.process.pid)
    await send(target, random.Random(9), 100)
    text = "hello world " * (8_000_000 // 12)
    loads = {
        "to answer": target.post("/chat/completions", target.chat(text, 1)),
        "to go on with": target.post("/completions", {"model": target.model, "prompt": text}),
        "to count": target.post("/tokenize", {"prompt": text}),
    }
    for name, request in loads.items():
        before, computed = await watched.quiet_footprint(None), seconds_of(api)
        replies = [await ask(target.port, request) for _ in range(NUM_LONG)]
        computed = (seconds_of(api) - computed) / NUM_LONG
        kept = (await watched.footprint()).memory[0] - before.memory[0]
        figure = f"{computed:.2f} s of processor time each; {kept:+.0f} MB kept"
        print(f"{name}: {figure}")
        assert {reply.status for reply in replies} == {200 if name == "to count" else 400}
        assert kept <= MOST_KEPT, figure
        assert computed <= MOST_SECONDS or name == "to count", figure
        record("R9", f"8 MB of text {name}, at a context of 8,192 tokens", NUM_LONG, 0, figure)


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def growth(prints: list[Footprint]) -> tuple[float, float]:
    """MB per thousand requests, of both processes."""
    api, engine = zip(*(one.memory for one in prints), strict=True)
    return slope(api, ROUND / 1000), slope(engine, ROUND / 1000)


async def send(target: Target, source: random.Random, number: int) -> Counter[str]:
    """So many requests, a few at once; the statuses that came."""
    outcomes: Counter[str] = Counter()
    places = asyncio.Semaphore(AT_ONCE)

    async def send_one() -> None:
        path, body = draw(target, source)
        request = target.post(path, body)
        async with places:
            if source.random() < ABORTED:
                await leave(target.port, request, source.uniform(0, 0.05), reset=source.random() < 0.5)
                outcomes["left"] += 1
                return
            reply = await ask(target.port, request)
            outcomes[str(reply.status) if reply.whole else f"{reply.status} cut"] += 1

    await asyncio.gather(*(send_one() for _ in range(number)))
    return outcomes
