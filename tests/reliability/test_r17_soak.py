"""R17: two replicas behind HAProxy under random faults: what holds of each holds of all together."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reliability.balanced import Balanced, balanced
from reliability.chaos import Chaos, Window
from reliability.figures import record
from reliability.footprint import used_blocks
from reliability.wire import LONGEST, Reply, Streamed, Target, ask, take_apart

NUM_TEXTS, NUM_TOKENS = 12, 24
NUM_WORKERS = 3
PROBES_PER_SECOND = 8.0
LEAST_AVAILABILITY = 0.99
GRACE = 3.0  # seconds after a fault's end within which a stream that it harmed may still find out


@dataclass
class Asked:
    """One request of a worker or a probe: when it was sent and answered, and what came."""

    text: int
    begin: float
    end: float
    reply: Reply


@dataclass
class Load:
    """Workers ask one request after the other; probes come at their own pace, whatever happens."""

    both: Balanced
    over: asyncio.Event = field(default_factory=asyncio.Event)
    work: list[Asked] = field(default_factory=list)
    probes: list[Asked] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_WORKERS):
                tasks.create_task(self._work())
            count = 0
            while not self.over.is_set():
                tasks.create_task(self._ask(count % NUM_TEXTS, self.probes))
                count += 1
                await asyncio.sleep(1 / PROBES_PER_SECOND)

    async def _work(self) -> None:
        while not self.over.is_set():
            await self._ask(random.randrange(NUM_TEXTS), self.work)

    async def _ask(self, text: int, asked: list[Asked]) -> None:
        begin = time.monotonic()
        reply = await ask(self.both.target.port, request(self.both.target, text), seconds=LONGEST)
        asked.append(Asked(text, begin, time.monotonic(), reply))


def request(target: Target, text: int) -> bytes:
    return target.post("/chat/completions", target.stream(f"text {text}", NUM_TOKENS))


@pytest.mark.timeout(2400)
async def test_soak(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seconds: float = pytestconfig.getoption("--soak-seconds")
    seed = pytestconfig.getoption("--soak-seed") or random.SystemRandom().randrange(10**6)
    print(f"\nseed {seed}")
    async with balanced(tmp_path, "--max-model-len", "1024") as both:
        expected = [
            take_apart(await ask(both.target.port, request(both.target, n))) for n in range(NUM_TEXTS)
        ]
        assert all(answer.complete for answer in expected)
        load, chaos = Load(both), Chaos(both, random.Random(seed))
        loading = asyncio.create_task(load.run())
        await chaos.run(seconds)
        load.over.set()
        await loading
        outcomes = Counter(
            judge(one, expected[one.text], chaos.windows) for one in (*load.work, *load.probes)
        )
        for replica in both.replicas:
            assert await used_blocks(replica.server, Target(replica.port, both.target.key)) == 0
            assert await replica.drain() == 0
        errors = "".join("".join([*replica.errors, replica.server.err]) for replica in both.replicas)
    assert "Traceback" not in errors, errors[errors.index("Traceback") - 500 :][:3000]
    accepted = sum(one.reply.status == 200 for one in load.probes)
    availability = accepted / len(load.probes)
    struck = Counter(window.name for window in chaos.windows)
    print(dict(outcomes), dict(struck), dict(chaos.crowd_statuses), availability)
    assert availability >= LEAST_AVAILABILITY, (outcomes, struck)
    assert max(chaos.unready_after, default=0) <= 1
    figure = (
        f"{100 * availability:.2f} % of {len(load.probes):,} new requests accepted; of all "
        f"{outcomes.total():,} streams {outcomes['whole']:,} came whole, {outcomes['told']} were told of "
        f"their engine's death, {outcomes['cut']} cut with their connection; none hung, no wrong token"
    )
    record("R17", f"{seconds:.0f} s of {len(struck)} kinds of faults", len(chaos.windows), 0, figure)


def judge(one: Asked, expected: Streamed, windows: list[Window]) -> str:
    """What became of a request. Fails where no fault excuses it, or a wrong token came."""
    felt = [w for w in windows if one.begin <= w.end + GRACE and w.begin <= one.end]
    reply = one.reply
    names = [window.name for window in felt]
    if reply.status == 503:
        assert int(reply.headers["retry-after"]) >= 1
        return "refused"
    if reply.status in (0, 502):
        assert any(window.cuts for window in felt), (reply, names)
        return "lost"
    assert reply.status == 200, (reply, names)
    answer = take_apart(reply)
    if answer.complete:
        assert reply.whole
        assert answer.text == expected.text
        return "whole"
    assert expected.text.startswith(answer.text), names
    if answer.error is not None:
        assert reply.whole
        assert answer.done
        assert any(window.tells for window in felt), (answer, names)
        return "told"
    assert not reply.whole, (answer, names)
    assert any(window.cuts for window in felt), (answer, names)
    return "cut"
