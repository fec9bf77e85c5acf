"""R14: what clients were told, what the API counts and what the engine counts is the same."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from reliability.figures import record
from reliability.wire import Json, Reply, Target, ask, leave
from server_process import ServerProcess

NUM_WHOLE, NUM_LEFT = 300, 60
MOST_TOKENS = 12
SETTLE_SECONDS = 15.0
HELD = ("num_sequences_open", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")

Sums = dict[str, float]


async def test_the_counts_add_up(start: Callable[..., ServerProcess]) -> None:
    """First while everybody stays, to the token; then while some leave, to the request."""
    target = Target.of(start("--max-num-seqs", "8", "--max-queue", "1000").wait_until_ready())
    source = random.Random(14)
    before = await sums(target)
    replies = await asyncio.gather(*(ask(target.port, wanted(target, source)) for _ in range(NUM_WHOLE)))
    told: Counter[str] = Counter()
    for reply in replies:
        usage = usage_of(reply)
        told["prompt"] += usage["prompt_tokens"]
        told["generated"] += usage["completion_tokens"]
    counted = await settled(target, before, NUM_WHOLE)
    assert counted["request_prompt_tokens_sum"] == told["prompt"]
    assert counted["request_generation_tokens_sum"] == told["generated"]
    assert counted["generation_tokens_total"] == told["generated"]
    assert counted["http_requests_total completed"] == NUM_WHOLE

    before = await sums(target)
    requests = [wanted(target, source) for _ in range(NUM_LEFT)]
    # They leave when their requests have been read, so that each of them is counted.
    await asyncio.gather(*(leave(target.port, one, source.uniform(0.5, 1.0)) for one in requests))
    counted = await settled(target, before, NUM_LEFT)
    assert num_ended(counted) == NUM_LEFT
    done = "usage told to clients beside what API and engine count, then clients that leave"
    figure = f"{told['prompt']:,} and {told['generated']:,} tokens by all three; every request ended once"
    record("R14", done, NUM_WHOLE + NUM_LEFT, 0, figure)


def wanted(target: Target, source: random.Random) -> bytes:
    """A request that is told its usage."""
    make = source.choice((target.chat, target.stream))
    body = make(f"number {source.randrange(100)}", source.randint(1, MOST_TOKENS), n=source.randint(1, 2))
    return target.post("/chat/completions", body)


def usage_of(reply: Reply) -> Json:
    assert reply.status == 200
    assert reply.whole
    if not reply.headers["content-type"].startswith("text/event-stream"):
        found: Json = reply.json()["usage"]
        return found
    (usage,) = [u for event in reply.events[:-1] if (u := json.loads(event).get("usage"))]
    told: Json = usage
    return told


async def sums(target: Target) -> Sums:
    """Every number of /metrics by its name; those of requests for answers by their outcome too."""
    reply = await ask(target.port, target.get("/metrics"))
    assert reply.status == 200
    found: Sums = defaultdict(float)
    for name, labels, value in re.findall(r"(?m)^toptwo:(\w+)(\{.*\})? (\S+)$", reply.body.decode()):
        if name == "http_requests_total":
            if "/chat/completions" in labels:
                outcome = re.search(r'outcome="(\w+)"', labels)
                assert outcome
                found[f"{name} {outcome[1]}"] += float(value)
        elif not name.endswith(("_bucket", "_seconds_sum")):
            found[name] += float(value)
    return found


async def settled(target: Target, before: Sums, number: int) -> Sums:
    """What has been counted since, when so many requests have ended and nothing is held any more."""
    async with asyncio.timeout(SETTLE_SECONDS):
        while True:
            now = await sums(target)
            counted = {name: value - before.get(name, 0) for name, value in now.items()}
            if num_ended(counted) >= number and not any(now[name] for name in HELD):
                return counted
            await asyncio.sleep(0.2)


def num_ended(counted: Sums) -> float:
    """Requests, whatever became of them."""
    return sum(value for name, value in counted.items() if name.startswith("http_requests"))
