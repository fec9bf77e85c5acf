"""When requests are sent: never more at once than asked for, or at their moment whatever the server does."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from toptwo.bench.client import Call, Outcome
from toptwo.bench.load import Level, LevelRun, run_level
from toptwo.bench.workload import arrivals

SECONDS = 0.02


class Server:
    """Takes SECONDS for an answer, or fails at once."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.num_open = self.most_open = 0
        self.started: list[float] = []

    async def ask(self, call: Call) -> Outcome:
        started = time.perf_counter()
        self.started.append(started)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0 if self.error else SECONDS)
        self.num_open -= 1
        return Outcome(started, [], time.perf_counter(), error=self.error)


async def load(server: Server, level: Level) -> LevelRun:
    return await run_level(level, itertools.repeat(Call("hi", 1)), server.ask, seed=4)


async def test_a_closed_loop_keeps_its_streams_busy() -> None:
    server = Server()
    run = await load(server, Level(concurrency=3, requests=10))
    assert len(run.outcomes) == len(server.started) == 10
    assert server.most_open == 3
    assert run.ended - run.started >= 4 * SECONDS * 0.99  # rounds of 3 + 3 + 3 + 1
    assert run.ended == max(outcome.ended for outcome in run.outcomes)


async def test_a_duration_ends_the_sending_not_the_answers() -> None:
    server = Server()
    run = await load(server, Level(concurrency=2, duration=2.5 * SECONDS))
    assert len(run.outcomes) == len(server.started) >= 2
    assert server.num_open == 0
    assert max(server.started) < run.started + 2.5 * SECONDS < run.ended


async def test_both_bounds_hold() -> None:
    assert len((await load(Server(), Level(concurrency=2, requests=3, duration=9))).outcomes) == 3


async def test_an_open_loop_does_not_wait() -> None:
    server = Server()
    run = await load(server, Level(rate=500, requests=40))
    assert len(run.outcomes) == 40
    assert server.most_open > 3
    due = list(itertools.islice(arrivals(500, seed=4), 40))
    late = [moment - run.started - planned for moment, planned in zip(server.started, due, strict=True)]
    assert min(late) > -0.002
    assert sorted(late)[20] < 0.1


async def test_an_open_loop_for_a_time() -> None:
    run = await load(Server(), Level(rate=500, duration=0.1))
    assert len(run.outcomes) == sum(moment < 0.1 for moment in itertools.islice(arrivals(500, 4), 200))


async def test_a_server_that_refuses_is_not_stormed() -> None:
    server = Server("http 429")
    await load(server, Level(concurrency=2, duration=0.15))
    assert 2 <= len(server.started) <= 4


@pytest.mark.parametrize(
    ("level", "most"),
    [
        (Level(concurrency=1), 16),
        (Level(concurrency=16), 64),
        (Level(rate=0.1), 16),
        (Level(rate=4), 120),
        (Level(concurrency=16, requests=20), 20),
        (Level(concurrency=16, duration=5), None),
    ],
)
def test_how_many_requests(level: Level, most: int | None) -> None:
    assert level.most_requests == most
