"""Decode speed and latency of a real server over HTTP, beside what the machine can do.

Starts `toptwo serve` (the default model unless a MODEL is given), then alternates rounds of each
number of streams, and prints medians over the rounds.

Run: make bench            or: make bench ARGS="--streams 1 --streams 8 --rounds 5 -- MODEL --threads 1"
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import openai

ROOT = Path(__file__).parents[2]
KEY = "bench-key"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "kernels" / "bench")]

from machine import describe_machine  # noqa: E402

from server_process import ServerProcess  # noqa: E402


@dataclass(frozen=True)
class Round:
    """decode: tokens per second of all streams together while all of them decode; ttft: seconds."""

    decode: float
    ttft: float


async def run_round(client: openai.AsyncOpenAI, model: str, streams: int, tokens: int) -> Round:
    """As many requests at once as streams, each with a prompt of its own."""
    moments: list[list[float]] = [[] for _ in range(streams)]
    began = time.perf_counter()

    async def stream(index: int) -> None:
        prompt = f"{time.time_ns()} Write a long story about a journey with {index + 2} friends."
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            temperature=0.8,
            seed=index,
            stream=True,
        )
        async for chunk in chunks:
            if chunk.choices[0].delta.content:
                moments[index].append(time.perf_counter())

    await asyncio.gather(*(stream(index) for index in range(streams)))
    # From the moment the last stream got its first token to the moment the first stream ended.
    start, end = max(m[0] for m in moments), min(m[-1] for m in moments)
    inside = sum(sum(start < moment <= end for moment in m) for m in moments)
    return Round(inside / (end - start), statistics.median(m[0] for m in moments) - began)


def peak_memory(pid: int) -> float:
    """Largest resident set of a process so far, in GB; mapped weights that were read count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


async def measure(server: ServerProcess, streams: list[int], rounds: int, tokens: int) -> None:
    results: dict[int, list[Round]] = {count: [] for count in streams}
    async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, timeout=3600) as client:
        model = (await client.models.list()).data[0].id
        await run_round(client, model, 1, 8)  # warm-up
        for _ in range(rounds):
            for count in streams:
                results[count].append(await run_round(client, model, count, tokens))
    print(f"model: {model}, {tokens} tokens per stream, medians [min-max] of {rounds} alternating rounds")
    for count, taken in results.items():
        speeds, waits = [r.decode for r in taken], [r.ttft for r in taken]
        print(
            f"{count:3d} streams: {statistics.median(speeds):7.1f} tok/s "
            f"[{min(speeds):.1f}-{max(speeds):.1f}], TTFT {statistics.median(waits):.2f} s"
        )
    engine, api = peak_memory(server.engine_pid), peak_memory(server.process.pid)
    print(f"peak memory: engine {engine:.2f} GB, API {api:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, action="append", help="streams at once; default 1 and 16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per stream")
    parser.add_argument("serve", nargs="*", help="MODEL and options of `toptwo serve`")
    arguments = parser.parse_args()

    print(describe_machine())
    with tempfile.TemporaryDirectory() as directory:
        cache = {"TOPTWO_CACHE_DIR": str(Path("~/.cache/toptwo").expanduser())}
        server = ServerProcess(Path(directory), [*arguments.serve, "--api-key", KEY], cache)
        try:
            server.wait_until_ready()
            asyncio.run(measure(server, arguments.streams or [1, 16], arguments.rounds, arguments.tokens))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
