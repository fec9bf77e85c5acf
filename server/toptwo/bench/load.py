"""The two ways to load a server: so many requests at once, or so many per second.

Knows when requests are sent; must not know what they say or what is made of their outcomes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from toptwo.bench.client import Call, Outcome
from toptwo.bench.workload import arrivals

LEAST_REQUESTS = 16
ROUNDS = 4  # requests that follow each other in one stream of a closed loop, when nothing is said
PAUSE_AFTER_FAILURE = 0.1  # seconds; a stream that is refused at once would ask thousands of times
OPEN_SECONDS = 30.0  # of an open loop, when nothing is said


@dataclass(frozen=True)
class Level:
    """One intensity of load: a closed loop of `concurrency` streams, or an open one of `rate` per second.

    requests: how many, or duration: seconds in which requests begin; those begun are waited for.
    """

    concurrency: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None

    @property
    def number(self) -> str:
        """The intensity, where it is clear what of."""
        return f"{self.concurrency or self.rate:g}"

    @property
    def name(self) -> str:
        """The intensity in words."""
        return f"{self.number} {'at once' if self.concurrency else 'per second'}"

    @property
    def most_requests(self) -> int | None:
        """How many requests are sent; None when the duration alone decides."""
        if self.requests or self.duration:
            return self.requests
        usual = ROUNDS * self.concurrency if self.concurrency else round(OPEN_SECONDS * (self.rate or 0))
        return max(LEAST_REQUESTS, usual)


@dataclass(frozen=True)
class LevelRun:
    """What came of a level. started, ended: time.perf_counter of its beginning and of its last answer."""

    level: Level
    started: float
    ended: float
    outcomes: list[Outcome] = field(default_factory=list)


Ask = Callable[[Call], Coroutine[Any, Any, Outcome]]
One = Callable[[], Coroutine[Any, Any, Outcome]]


async def run_level(level: Level, calls: Iterator[Call], ask: Ask, seed: int) -> LevelRun:
    """Send the level's requests by `ask` and wait for all their outcomes, which are in order of ending."""
    outcomes: list[Outcome] = []
    started = time.perf_counter()

    async def one() -> Outcome:
        outcome = await ask(next(calls))
        outcomes.append(outcome)
        return outcome

    if level.concurrency:
        await _closed_loop(level, one)
    else:
        await _open_loop(level, one, seed)
    ended = max((outcome.ended for outcome in outcomes), default=started)
    return LevelRun(level, started, ended, outcomes)


async def _closed_loop(level: Level, one: One) -> None:
    """Each stream sends its next request when its last one has ended."""
    most = level.most_requests
    deadline = _deadline(level)
    num_sent = 0

    async def stream() -> None:
        nonlocal num_sent
        while (most is None or num_sent < most) and time.perf_counter() < deadline:
            num_sent += 1
            if (await one()).error is not None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE)

    async with asyncio.TaskGroup() as group:
        for _ in range(level.concurrency or 1):
            group.create_task(stream())


async def _open_loop(level: Level, one: One, seed: int) -> None:
    """Requests come when they come, however many are still waiting."""
    most, deadline = level.most_requests, _deadline(level)
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for num_sent, moment in enumerate(arrivals(level.rate or 0, seed)):
            if num_sent == most or started + moment >= deadline:
                break
            # Towards the moment itself: sleeps that come late must not add up.
            await asyncio.sleep(started + moment - time.perf_counter())
            group.create_task(one())


def _deadline(level: Level) -> float:
    return time.perf_counter() + level.duration if level.duration else float("inf")
