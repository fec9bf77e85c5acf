"""R6 behind a balancer: both replicas are restarted under load, and no request notices."""

from __future__ import annotations

import asyncio
from pathlib import Path

from reliability.balanced import Balanced, balanced
from reliability.figures import record
from reliability.wire import Reply, ask, take_apart

NUM_ROUNDS = 2  # of restarting one replica and then the other
NUM_WORKERS, NUM_TOKENS = 4, 16
NUM_LONG, LONG_TOKENS = 8, 600  # streams that are open when a replica is told to stop


async def test_a_rolling_restart_fails_no_request(tmp_path: Path) -> None:
    async with balanced(tmp_path, "--max-model-len", "1024") as both:
        over = asyncio.Event()
        working = [asyncio.create_task(work(both, number, over)) for number in range(NUM_WORKERS)]
        long_ones: list[asyncio.Task[Reply]] = []
        for replica in both.replicas * NUM_ROUNDS:
            begun = asyncio.Semaphore(0)
            request = both.target.post("/chat/completions", both.target.stream("a long one", LONG_TOKENS))
            for _ in range(NUM_LONG):
                asking = ask(both.target.port, request, begun=begun.release)
                long_ones.append(asyncio.create_task(asking))
            for _ in range(NUM_LONG):
                await begun.acquire()
            assert await replica.drain() == 0
            assert "Traceback" not in replica.server.err
            replica.start()
            await replica.wait_until_ready()
            await both.wait_until_up()
        over.set()
        replies = [reply for worker in await asyncio.gather(*working) for reply in worker]
        streams = await asyncio.gather(*long_ones)
    failed = [reply for reply in replies if reply.status != 200 or not reply.whole]
    assert not failed, (len(failed), failed[0])
    for reply in streams:
        assert reply.status == 200
        assert reply.whole
        assert take_apart(reply).complete
    number = NUM_ROUNDS * len(both.replicas)
    figure = f"{len(replies):,} new requests and {len(streams)} streams open meanwhile: none failed, none cut"
    record("R6", "rolling restarts of two replicas behind HAProxy, under load", number, 0, figure)


async def work(both: Balanced, number: int, over: asyncio.Event) -> list[Reply]:
    """One new request after the other, streams and whole answers in turn."""
    replies: list[Reply] = []
    while not over.is_set():
        make = both.target.stream if len(replies) % 2 else both.target.chat
        request = both.target.post("/chat/completions", make(f"worker {number}", NUM_TOKENS))
        replies.append(await ask(both.target.port, request))
    return replies
