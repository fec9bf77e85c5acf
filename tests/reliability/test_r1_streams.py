"""R1: no token is lost, doubled or somebody else's, with as many streams as two cores carry."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from reliability.figures import record
from reliability.wire import Reply, Streamed, Target, ask, ask_all, take_apart
from server_process import ServerProcess

NUM_STREAMS, NUM_TOKENS = 64, 64
CROWDS = (256, 1024, 2048, 4096)
TOKENS_IN_A_CROWD = 32
SLOW_STEPS = (
    "slow@500*"  # milliseconds more each: streams that wait most of the time, as those of large models do
)
ENOUGH_SECONDS = 25.0  # when a crowd has taken so long, a larger one is not tried
FAULT_SWITCH = Path(__file__).parents[1] / "fault_switch"

Start = Callable[..., ServerProcess]


def whole(reply: Reply, num_tokens: int) -> Streamed:
    """The stream, which must have come in full."""
    assert reply.status == 200, reply
    assert reply.whole
    answer = take_apart(reply)
    assert answer.complete, answer
    assert answer.ended == "length"
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == num_tokens
    return answer


async def test_streams_are_what_they_are_alone(server: ServerProcess) -> None:
    """Token by token and bit by bit of their probabilities."""
    target = Target.of(server)
    requests = [
        target.post("/chat/completions", target.stream(f"tell me of {n}", NUM_TOKENS, logprobs=True))
        for n in range(NUM_STREAMS)
    ]
    together = [whole(reply, NUM_TOKENS) for reply in await ask_all(target.port, requests)]
    alone = [whole(await ask(target.port, request), NUM_TOKENS) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert len(one.tokens) == NUM_TOKENS
        assert (one.text, one.tokens) == (other.text, other.tokens)
    assert len({one.text for one in together}) > NUM_STREAMS / 2  # or a mix-up would not be seen
    figure = f"{NUM_STREAMS}/{NUM_STREAMS} identical, their log-probabilities bit by bit"
    done = f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens at once, each again alone"
    record("R1", done, NUM_STREAMS, 0, figure)


async def test_the_largest_crowd(start: Start, server: ServerProcess) -> None:
    """All of them run in the same steps, so all are open from the first token to the last."""
    most = CROWDS[-1]
    arguments = ["--max-num-seqs", str(most), "--max-step-tokens", str(most), "--max-model-len", "128"]
    slow = {"PYTHONPATH": str(FAULT_SWITCH), "FAULTS": SLOW_STEPS}
    target = Target.of(start(*arguments, "--kv-cache-gib", "0.1", **slow).wait_until_ready())
    quick = Target.of(server)
    alone = [whole(await ask(quick.port, request), TOKENS_IN_A_CROWD) for request in crowd(quick, 16)]
    served, seconds = 0, 0.0
    for number in CROWDS:
        began = time.monotonic()
        at_once, replies = await ask_crowd(target, number)
        elapsed = time.monotonic() - began
        failed = [reply.status for reply in replies if reply.status != 200]
        if failed:
            print(f"{number} streams: {len(failed)} not served, with status {sorted(set(failed))}")
            break
        answers = [whole(reply, TOKENS_IN_A_CROWD) for reply in replies]
        for n, answer in enumerate(answers):
            assert answer.text == alone[n % len(alone)].text
        print(f"{number} streams, {at_once} open at once: {elapsed:.1f} s")
        if at_once < number:  # the first ended before the last began
            break
        served, seconds = number, elapsed
        if elapsed > ENOUGH_SECONDS:
            break
    assert served >= 256
    figure = f"{served:,} streams open at once without an error, done in {seconds:.0f} s"
    record("R1", f"ever larger crowds of streams of {TOKENS_IN_A_CROWD} tokens", served, 0, figure)


def crowd(target: Target, number: int) -> list[bytes]:
    texts = [f"n {n % 16}" for n in range(number)]
    return [target.post("/chat/completions", target.stream(text, TOKENS_IN_A_CROWD)) for text in texts]


async def ask_crowd(target: Target, number: int) -> tuple[int, list[Reply]]:
    """The most streams that were open at the same time, and the answers."""
    now, most = 0, 0

    async def ask_one(request: bytes) -> Reply:
        nonlocal now

        def count() -> None:
            nonlocal now, most
            now += 1
            most = max(most, now)

        try:
            return await ask(target.port, request, begun=count)
        finally:
            now -= 1

    replies = await asyncio.gather(*map(ask_one, crowd(target, number)))
    return most, replies


async def test_a_low_limit_of_open_files_is_raised(start: Start) -> None:
    """A shell's limit is often 1,024, which a thousand streams would meet."""
    streams = 300
    with soft_limit_of_open_files(200):
        server = start("--max-num-seqs", "512").wait_until_ready()
    assert psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] > streams
    target = Target.of(server)
    for reply in await ask_all(target.port, crowd(target, streams)):
        whole(reply, TOKENS_IN_A_CROWD)


@contextmanager
def soft_limit_of_open_files(number: int) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
