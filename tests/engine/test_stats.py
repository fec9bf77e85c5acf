"""The engine's own numbers, asked for across waist 1."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from engine_processes import collect, request, supervised
from toptwo.messages import SECONDS, Histogram

PROMPT = list(range(10))


def test_a_histogram_counts_what_is_at_most_a_bound_below_it() -> None:
    histogram = Histogram.over((1, 10))
    for value in (0, 1, 1.5, 10, 11):
        histogram.add(value)
    histogram.add(2, times=3)
    assert histogram == Histogram([1, 10], [2, 5, 1], 29.5)
    assert list(SECONDS) == sorted(SECONDS)


async def test_numbers_are_those_of_the_requests(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (supervisor, _):
        await asyncio.wait_for(supervisor.client.ready.wait(), 30)
        before = await supervisor.client.stats()
        assert before is not None
        assert (before.prompt_tokens, before.generation_tokens, before.prefix_queries) == (0, 0, 0)
        events = await collect(supervisor, request("a", PROMPT, 5))
        assert events[0].queue_seconds is not None
        assert 0 <= events[0].queue_seconds < 30
        assert all(event.queue_seconds is None for event in events[1:])
        await collect(supervisor, request("b", PROMPT, 3))
        after = await supervisor.client.stats()
    assert after is not None
    assert (after.prompt_tokens, after.generation_tokens) == (20, 8)
    assert (after.prefix_queries, after.prefix_hits) == (20, 8)  # two blocks of 4 tokens
    assert (after.num_running, after.num_waiting, after.preemptions) == (0, 0, 0)
    assert after.num_free_blocks == before.num_free_blocks
    steps = sum(after.step_seconds.counts)
    assert after.expert_tokens == {0: [steps, 0]}
    assert steps == 8


async def test_what_waits_and_runs_is_seen(tmp_path: Path) -> None:
    async with supervised(tmp_path, "slow") as (supervisor, _):
        client = supervisor.client
        await asyncio.wait_for(client.ready.wait(), 30)
        crowd = [asyncio.create_task(collect(supervisor, request(str(i), [i], 400))) for i in range(11)]
        async with asyncio.timeout(30):
            while (stats := await client.stats()) is None or stats.num_waiting != 3:
                pass
        assert stats.num_running == 8
        for one in crowd:
            one.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)


async def test_an_engine_that_is_busy_or_gone_keeps_nobody(tmp_path: Path) -> None:
    async with supervised(tmp_path, "sleep-in-step") as (supervisor, _):
        client = supervisor.client
        await asyncio.wait_for(client.ready.wait(), 30)
        first = await client.stats()
        stuck = asyncio.create_task(collect(supervisor, request("a", PROMPT, 50)))
        began = time.monotonic()
        async with asyncio.timeout(30):
            while time.monotonic() - began < 1:
                latest = await client.stats()
        assert latest is not None  # what it told last
        assert latest.generation_tokens < 50
        assert first is not None
        assert client.num_restarts == 0
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        await stuck
        assert await client.stats() is None or client.info is not None
        await asyncio.wait_for(client.ready.wait(), 30)
        assert client.num_restarts == 1
        fresh = await client.stats()
        assert fresh is not None
        assert fresh.generation_tokens == 0
