"""An open-loop client: requests leave when the schedule says so, whatever became of those before.

Every time is counted from when a request should have left, so that a client that falls behind makes the
server look worse, not better. Knows HTTP/1.1 and streams as our server speaks them.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from reliability.wire import LONGEST, Target

MOST_TOKENS = 16


@dataclass
class Visit:
    """One request. Times are of `time.monotonic`, 0 where a thing did not happen.

    due: when it should have left. answered: when the head came. begun: when the first token came.
    whole: the stream ended with [DONE] and without an error.
    """

    due: float
    status: int = 0
    retry_after: int = 0
    answered: float = 0.0
    begun: float = 0.0
    ended: float = 0.0
    whole: bool = False

    async def make(self, target: Target) -> Visit:
        """Be there when it is due, and stay to the end. Raises TimeoutError for a hang."""
        await asyncio.sleep(self.due - time.monotonic())
        # With reports, every token is an event; half a character would else be held back.
        body = target.chat("hello", MOST_TOKENS, stream=True, logprobs=True)
        async with asyncio.timeout(LONGEST):
            reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
            try:
                writer.write(target.post("/chat/completions", body))
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.answered = time.monotonic()
                self.status = int(head.split()[1])
                for line in head.lower().splitlines():
                    if line.startswith("retry-after:"):
                        self.retry_after = int(line.partition(":")[2])
                received = bytearray()
                while data := await reader.read(1 << 16):
                    if not self.begun and b"data: " in data:
                        self.begun = time.monotonic()
                    received += data
                self.ended = time.monotonic()
                self.whole = b"data: [DONE]" in received and b'"error"' not in received
            finally:
                writer.close()
        return self


async def at_rate(target: Target, per_second: float, seconds: float, seed: int) -> list[Visit]:
    """Arrivals as strangers make them: independent of one another, so many per second on average."""
    draw = random.Random(seed)
    due, visits = time.monotonic() + 0.1, []
    end = due + seconds
    while due < end:
        visits.append(Visit(due))
        due += draw.expovariate(per_second)
    return list(await asyncio.gather(*(visit.make(target) for visit in visits)))


async def closed_loop(target: Target, clients: int, seconds: float) -> float:
    """Answers per second when so many clients always want one; the first and last second do not count."""
    start = time.monotonic()

    async def client() -> list[Visit]:
        visits = []
        while time.monotonic() < start + seconds:
            visits.append(await Visit(time.monotonic()).make(target))
        return visits

    visits = [visit for one in await asyncio.gather(*(client() for _ in range(clients))) for visit in one]
    ends = [v.ended for v in visits if v.whole and start + 1 <= v.ended < start + seconds - 1]
    return len(ends) / (seconds - 2)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def most_at_once(visits: list[Visit]) -> int:
    """How many accepted requests were open at the same time, as their clients saw it."""
    changes = [(v.answered, 1) for v in visits if v.status == 200]
    changes += [(v.ended, -1) for v in visits if v.status == 200]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
